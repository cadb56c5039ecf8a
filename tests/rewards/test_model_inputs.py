"""Prompts that were put through a chat template before, and prompts that begin the answer."""

import pytest
import torch

from grpo_trl.rewards import RewardModel
from grpo_trl.rewards.model_inputs import is_templated
from tests import tiny

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many?"}
TEMPLATED = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = [{"role": "assistant", "content": "72"}]


def chat_model(**kwargs) -> RewardModel:
    return RewardModel(tiny.tiny_reward_model("qwen3"), tiny.tiny_tokenizer(**kwargs))


def pair_model(**kwargs) -> RewardModel:
    return RewardModel(tiny.tiny_reward_model(), tiny.tiny_tokenizer(chat=False, pair=True), **kwargs)


def text_of(reward, prompt, completion) -> str:
    """What the model reads, special tokens included."""
    ids = reward._encode(prompt, completion)["input_ids"]
    return reward.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        TEMPLATED,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n",
        "<|turn>user\nHi<turn|>\n",
        "<s>[INST] Hi [/INST]",
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi",
    ],
)
def test_templates_are_recognised(text):
    assert is_templated(text)


@pytest.mark.parametrize(
    "prompt",
    [
        "How many?",
        "Is a < b | c > d?",
        "xs |> map f <| ys",
        "<psi|phi> and |psi>",
        "<b>bold</b> <user>",
        "User: Hi\nAssistant:",
        "x[INSTANCE]",
        [{"role": "user", "content": "<|im_start|>"}],
    ],
)
def test_other_prompts_are_not(prompt):
    assert not is_templated(prompt)


@pytest.mark.parametrize("completion", ["72", ANSWER])
@pytest.mark.parametrize("bos", [False, True])
def test_templated_text_scores_as_its_messages(bos, completion):
    reward = chat_model(bos=bos)
    prompt = ("<|bos|>" if bos else "") + TEMPLATED
    assert text_of(reward, prompt, completion) == prompt + "72<|im_end|>\n"
    assert reward([prompt], [completion]) == reward([[USER]], [ANSWER])
    assert reward([TEMPLATED], [completion]) == reward([[USER]], [ANSWER])


def test_templated_text_of_another_family_stays_as_it_is():
    prompt = "<start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n"
    assert text_of(chat_model(), prompt, "72") == prompt + "72<|im_end|>\n"


def test_a_pair_model_reads_templated_text_as_one_text():
    assert text_of(pair_model(), TEMPLATED, "72") == f"[CLS]{TEMPLATED}72[SEP]"
    assert text_of(pair_model(input_format="text"), TEMPLATED, "72") == f"[CLS]{TEMPLATED}72[SEP]"
    assert text_of(pair_model(), "How many?", "72") == "[CLS]How many?[SEP]72[SEP]"


def test_text_has_one_bos():
    reward = RewardModel(tiny.tiny_reward_model("qwen3"), tiny.tiny_tokenizer(bos=True), input_format="text")
    for prompt in (TEMPLATED, f"<|bos|>{TEMPLATED}"):
        assert text_of(reward, prompt, "72") == f"<|bos|>{TEMPLATED}72"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (chat_model, "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nI say 72<|im_end|>\n"),
        (pair_model, "[CLS]How many?[SEP]I say 72[SEP]"),
        (lambda: pair_model(input_format="text"), "[CLS]How many?\n\nI say 72[SEP]"),
    ],
)
@pytest.mark.parametrize("completion", [" 72", [{"role": "assistant", "content": " 72"}]])
def test_a_prefill_is_the_beginning_of_the_answer(make, expected, completion):
    prompt = [USER, {"role": "assistant", "content": "I say"}]
    assert text_of(make(), prompt, completion) == expected


def test_turns_of_a_tool_stay_turns():
    prompt = [SYSTEM, USER, {"role": "assistant", "content": "I"}]
    completion = [
        {"role": "assistant", "content": " count:", "tool_calls": []},
        {"role": "tool", "content": "72"},
        {"role": "assistant", "content": "So 72."},
    ]
    assert text_of(chat_model(), prompt, completion) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\nI count:<|im_end|>\n<|im_start|>tool\n72<|im_end|>\n"
        "<|im_start|>assistant\nSo 72.<|im_end|>\n"
    )
    assert text_of(pair_model(), prompt, completion) == "[CLS]Be brief.\n\nHow many?[SEP]So 72.[SEP]"
    assert completion[0]["content"] == " count:"  # the caller's messages are left alone


def test_earlier_answers_of_a_conversation_are_no_prefill():
    prompt = [USER, {"role": "assistant", "content": "71"}, {"role": "user", "content": "Sure?"}]
    assert text_of(pair_model(), prompt, ANSWER) == "[CLS]Sure?[SEP]72[SEP]"
    ids = chat_model()._encode(prompt, ANSWER)["input_ids"]
    assert torch.tensor(ids).eq(tiny.IM_START).sum() == 4
