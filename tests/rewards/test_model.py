"""RewardModel: formats, padding, truncation, refusals."""

import pytest
import torch

from grpo_trl import GRPOConfig
from grpo_trl.batch import Group, Prompt
from grpo_trl.rewards import RewardModel, RewardScorer, accuracy, loading, model
from grpo_trl.rewards.model import encode_with_one_bos
from tests import tiny

PROMPTS = ["How many?", "Why is the sky blue, and the sea too?", "Hm", "Name a river in France."]
COMPLETIONS = ["72", "Because of scattering.", "A long answer to a short question, to mix up the lengths", ""]


def chat(prompts, completions):
    return (
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        [[{"role": "assistant", "content": completion}] for completion in completions],
    )


def deberta(**kwargs) -> RewardModel:
    tokenizer = tiny.tiny_tokenizer(chat=False, pair=True)
    return RewardModel(tiny.tiny_reward_model(), tokenizer, **kwargs)


def qwen3(pad_is_eos=False, bos=False, **kwargs) -> RewardModel:
    return RewardModel(tiny.tiny_reward_model("qwen3"), tiny.tiny_tokenizer(pad_is_eos=pad_is_eos, bos=bos), **kwargs)


def tokens_seen(reward: RewardModel, prompts, completions) -> list[list[int]]:
    """The ids, without padding, that reach the model for each row."""
    seen = []
    hook = reward.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(
            ids[mask.bool()].tolist() for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        ),
        with_kwargs=True,
    )
    reward.batch_size = 1
    for prompt, completion in zip(prompts, completions, strict=True):
        reward([prompt], [completion])
    hook.remove()
    return seen


@pytest.mark.parametrize("make", [deberta, qwen3, lambda **k: qwen3(pad_is_eos=True, **k)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_batch_scores_like_its_rows(make, batch_size):
    reward = make(batch_size=batch_size)
    alone = [reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) == len(alone)  # a constant model would pass the line above


def test_a_pass_has_the_tokens_of_the_longest_rows():
    reward, shapes = deberta(batch_size=2), []
    reward.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    # [CLS] question [SEP] answer [SEP]: 5, 23, 13 and 8 tokens
    reward(["q"] * 4, ["a", "a" * 19, "a" * 9, "a" * 4])
    assert shapes == [(2, 23), (2, 8)]
    shapes.clear()
    reward(["q"] * 6, ["a", "a" * 19, "a", "a", "a", "a"])
    assert shapes == [(2, 23), (4, 5)]  # more of the short ones
    reward.limit.tokens = 23  # as after an out-of-memory error
    shapes.clear()
    reward(["q"] * 4, ["a", "a" * 19, "a" * 9, "a" * 4])
    assert shapes == [(1, 23), (1, 13), (2, 8)]


def test_pair_scores_are_the_models_own_on_the_tokenizers_pair():
    reward = deberta()
    assert reward.input_format == "pair"
    inputs = reward.tokenizer(PROMPTS[1], COMPLETIONS[1], return_tensors="pt")
    with torch.no_grad():
        expected = tiny.tiny_reward_model()(**inputs).logits.item()
    assert reward(PROMPTS[1:2], COMPLETIONS[1:2]) == pytest.approx([expected], abs=1e-5)
    assert reward(*chat(PROMPTS[1:2], COMPLETIONS[1:2])) == pytest.approx([expected], abs=1e-5)


def test_pair_question_is_the_system_text_and_the_last_user_message():
    reward = deberta()
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]
    answer = [{"role": "assistant", "content": "yes"}]
    (ids,) = tokens_seen(reward, [conversation], [answer])
    assert ids == reward.tokenizer("Be brief.\n\nsecond", "yes")["input_ids"]


def test_chat_scores_are_the_models_own_on_the_template():
    reward = qwen3()
    assert reward.input_format == "chat"
    text = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n72<|im_end|>\n"
    expected_ids = reward.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens_seen(reward, PROMPTS[:1], COMPLETIONS[:1]) == [expected_ids]
    assert tokens_seen(reward, *chat(PROMPTS[:1], COMPLETIONS[:1])) == [expected_ids]
    with torch.no_grad():
        expected = tiny.tiny_reward_model("qwen3")(torch.tensor([expected_ids])).logits.item()
    assert reward(PROMPTS[:1], COMPLETIONS[:1]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("template_has_bos", [True, False])
def test_chat_has_exactly_one_bos(template_has_bos):
    reward = qwen3(bos=True)
    if not template_has_bos:
        reward.tokenizer.chat_template = reward.tokenizer.chat_template.replace("{{ bos_token if bos_token }}", "")
    (ids,) = tokens_seen(reward, PROMPTS[:1], COMPLETIONS[:1])
    assert ids[0] == tiny.BOS and ids.count(tiny.BOS) == 1
    assert encode_with_one_bos(reward.tokenizer, "<|bos|><|bos|>x")["input_ids"].count(tiny.BOS) == 1
    assert tiny.BOS not in tokens_seen(qwen3(), PROMPTS[:1], COMPLETIONS[:1])[0]


def test_text_format():
    reward = deberta(input_format="text")
    (ids,) = tokens_seen(reward, ["1+1="], ["2"])
    assert ids == reward.tokenizer("1+1=2")["input_ids"]
    (ids,) = tokens_seen(reward, *chat(["1+1="], ["2"]))
    assert ids == reward.tokenizer("1+1=\n\n2")["input_ids"]
    with pytest.raises(ValueError, match=r"input_format='chat' .* has none; use 'auto' or 'pair'"):
        deberta(input_format="chat")
    with pytest.raises(ValueError, match=r"'pairs' is unknown.*auto, pair, chat, text"):
        deberta(input_format="pairs")


def test_chat_template_kwargs_reach_the_template():
    reward = qwen3(chat_template_kwargs={"add_generation_prompt": True})
    (ids,) = tokens_seen(reward, ["a"], ["b"])
    assert reward.tokenizer.decode(ids).endswith("b<|im_end|>\n<|im_start|>assistant\n")


def test_positions_that_begin_after_the_padding():
    model = tiny.tiny_reward_model("roberta", intermediate_size=64, max_position_embeddings=20)
    tokenizer = tiny.tiny_tokenizer(chat=False, pair=True)
    tokenizer.model_max_length = 10**30
    reward = RewardModel(model, tokenizer)
    assert reward.max_length == 20 - 1 - tiny.PAD  # positions 1 to 19: that of the padding is 0
    assert len(reward(["0123456789" * 3], ["abcde"])) == 1


def test_a_column_named_self():
    assert len(deberta()(prompts=["a"], completions=["b"], self=[1])) == 1


# bytes: [CLS] + 10 + [SEP] + 5 + [SEP] = 18 tokens
@pytest.mark.parametrize(
    ("max_length", "question", "answer"),
    [(18, "0123456789", "abcde"), (12, "6789", "abcde"), (8, "", "abcde"), (6, "", "cde")],
)
def test_pair_truncation_keeps_the_answer(max_length, question, answer):
    reward = deberta(max_length=max_length)
    metrics = {}
    reward(["0123456789", ""], ["abcde", "a"], log_metric=metrics.__setitem__)
    assert reward.num_truncated == int(max_length < 18)
    assert metrics == {f"rewards/{reward.__name__}/truncated": reward.num_truncated / 2}
    (ids,) = tokens_seen(reward, ["0123456789"], ["abcde"])
    assert ids == reward.tokenizer(question, answer)["input_ids"]


@pytest.mark.parametrize("bos", [True, False])
def test_chat_truncation_keeps_bos_and_the_end(bos):
    reward = qwen3(bos=bos)
    (full,) = tokens_seen(reward, ["0123456789"], ["abcde"])
    reward.max_length = 20
    (ids,) = tokens_seen(reward, ["0123456789"], ["abcde"])
    assert len(ids) == 20
    assert ids == ([tiny.BOS, *full[-19:]] if bos else full[-20:])
    assert "abcde" in reward.tokenizer.decode(ids)


def test_limits_come_from_tokenizer_and_model():
    assert deberta().max_length == tiny.MAX_POSITIONS
    tokenizer = tiny.tiny_tokenizer(chat=False, pair=True)
    tokenizer.model_max_length = 10**30
    assert RewardModel(tiny.tiny_reward_model(), tokenizer).max_length == tiny.MAX_POSITIONS
    tokenizer.model_max_length = 64
    assert RewardModel(tiny.tiny_reward_model(), tokenizer).max_length == 64


def test_from_path(reward_model_dir):
    reward = RewardModel(reward_model_dir, device_map="cpu", dtype="float32")
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(deberta()(PROMPTS, COMPLETIONS), abs=1e-5)
    assert reward.__name__ == reward_model_dir.rsplit("/", 1)[-1]
    assert RewardModel(f"{reward_model_dir}/", device_map="cpu").__name__ == reward.__name__
    half = RewardModel(reward_model_dir, device_map={"": "cpu"}, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half(PROMPTS, COMPLETIONS) == pytest.approx(deberta()(PROMPTS, COMPLETIONS), abs=1.0)


def test_frozen_in_eval_mode_on_its_device_in_its_dtype():
    model = tiny.tiny_reward_model("qwen3").train()
    reward = RewardModel(model, tiny.tiny_tokenizer(), device_map="cpu", dtype=torch.float64)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float64
    assert len(reward(PROMPTS, COMPLETIONS)) == 4


def test_the_trainers_autocast_does_not_reach_it():
    reward = qwen3()
    expected = reward(PROMPTS, COMPLETIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reward(PROMPTS, COMPLETIONS) == expected


def test_several_labels_are_refused(tmp_path):
    model, tokenizer = tiny.tiny_reward_model(num_labels=2), tiny.tiny_tokenizer(chat=False, pair=True)
    with pytest.raises(ValueError, match=r"has 2 labels; expected one.*num_labels=1.*reward function"):
        RewardModel(model, tokenizer)
    with pytest.raises(ValueError, match=r"has 2 labels"):
        RewardModel(tiny.save(model, tokenizer, tmp_path))


def test_a_checkpoint_without_a_reward_head_is_refused(model_dir):
    with pytest.raises(ValueError, match=r"lacks the weights score.weight.*random"):
        RewardModel(model_dir, model_init_kwargs={"num_labels": 1})


def test_other_refusals():
    model = tiny.tiny_reward_model()
    with pytest.raises(ValueError, match="pass processing_class"):
        RewardModel(model)
    bare = tiny.tiny_tokenizer(chat=False, pair=True)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="set pad_token"):
        RewardModel(model, bare)
    with pytest.raises(ValueError, match="works with a path"):
        RewardModel(model, tiny.tiny_tokenizer(chat=False, pair=True), device_map="auto")
    with pytest.raises(ValueError, match="batch_size=0"):
        deberta(batch_size=0)


def test_model_and_function_combine_and_the_model_never_leaves_the_process():
    reward = deberta()
    scorer = RewardScorer([reward, accuracy], timeout=5)
    assert scorer._calls[0] is reward
    group = Group(Prompt([1], {"prompt": "1+1=", "answer": "2"}, 0), [[1], [2]], [True, True], completions=["2", "3"])
    metrics = {}
    rewards = scorer.score([group], log_metric=metrics.__setitem__)
    expected = torch.tensor([reward(["1+1="] * 2, ["2", "3"]), [1.0, 0.0]], dtype=torch.float64).T
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    assert metrics == {f"rewards/{reward.__name__}/truncated": 0.0}
    scorer.close()


def test_all_that_is_read_of_a_reward_model_is_of_one_revision(tmp_path, monkeypatch):
    asked = []
    for module, name in ((loading, "AutoConfig"), (model, "AutoTokenizer")):
        kind = getattr(module, name)
        monkeypatch.setattr(
            kind, "from_pretrained",
            lambda path, name=name, read=kind.from_pretrained, **options: asked.append((name, options.get("revision")))
            or read(path, **options),
        )  # fmt: skip
    folder = tiny.save(tiny.tiny_reward_model(), tiny.tiny_tokenizer(), tmp_path)
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, reward_model_init_kwargs={"revision": "v2"})
    loading.check_rewards([folder], None, args)
    RewardModel(folder, model_init_kwargs={"revision": "v2"})
    assert {("AutoConfig", "v2"), ("AutoTokenizer", "v2")} <= set(asked)
    assert ("AutoTokenizer", None) not in asked
