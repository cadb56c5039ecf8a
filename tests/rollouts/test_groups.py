"""Groups: in the order of the prompts, decoded without special tokens, refused where the policy diverged."""

import math

import pytest
import torch
from trl.chat_template_utils import llama3_template, qwen3_template

from grpo_trl import GRPOTrainer
from grpo_trl.batch import Group, Prompt
from grpo_trl.rewards import completion_texts, reasoning_accuracy, think_format
from grpo_trl.rollouts import SamplingParams, check_finite, decode_completions, make_engine, ordered_groups
from grpo_trl.rollouts.sampling import sample
from tests.test_trainer import PROMPTS, trainer
from tests.tiny import ENDOFTEXT, IM_END, IM_START, PAD, tiny_model, tiny_tokenizer

DRAWS = [Prompt([10 + draw], {"prompt": f"prompt {draw}"}, draw) for draw in range(3)]


# ---- Order ----


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_groups_are_in_the_order_of_the_prompts(order):
    groups = [Group(DRAWS[i], [[20 + i], [30 + i]], [True, True]) for i in order]
    assert [group.completion_ids for group in ordered_groups(DRAWS, groups, 2)] == [
        [[20], [30]],
        [[21], [31]],
        [[22], [32]],
    ]
    reversed_prompts = DRAWS[::-1]
    assert [group.prompt for group in ordered_groups(reversed_prompts, groups, 2)] == reversed_prompts


def test_groups_that_arrive_out_of_order_are_trained_in_order_with_their_own_prompts(tmp_path):
    """Each completion spells its prompt, so that a mixed-up row would show in rewards and ids."""
    rewarded, trained = [], []

    class LastFirst(GRPOTrainer):
        def rollout(self, prompts):
            for prompt in reversed(prompts):
                rows = [[*prompt.ids, 20 + i, IM_END] for i in range(self.sampling.num_generations)]
                yield Group(prompt, rows, [True] * len(rows))

        def compute_loss(self, model, inputs, **kwargs):
            for row in range(len(inputs)):
                prompt = inputs.prompt_ids[row][inputs.prompt_mask[row].bool()]
                assert torch.equal(inputs.completion_ids[row][: len(prompt)], prompt)
                trained.append(self.processing_class.decode(prompt))
            return super().compute_loss(model, inputs, **kwargs)

    def spelled(prompts, completions, **kwargs):
        rewarded.extend(completion.startswith(prompt) for prompt, completion in zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    run = trainer(tmp_path, cls=LastFirst, rewards=spelled, shuffle_dataset=False, num_iterations=1, max_steps=2)
    run.train()
    assert rewarded == [True] * 16
    assert trained == [prompt for prompt in PROMPTS[:4] for _ in range(4)]


# ---- Decoding ----


@pytest.mark.parametrize("conversational", [False, True])
def test_special_tokens_are_left_out_of_what_rewards_read(conversational):
    tokenizer = tiny_tokenizer()
    text = tokenizer("So 72.").input_ids
    prompt = [{"role": "user", "content": "q"}] if conversational else "q"
    rows = [[*text, IM_END], [*text, ENDOFTEXT], [IM_START, *text[:3], IM_END, *text[3:]], [IM_END]]
    group = Group(Prompt([1], {"prompt": prompt}, 0), rows, [True, True, False, True])
    expected = ["So 72.", "So 72.", "So 72.", ""]
    if conversational:
        expected = [[{"role": "assistant", "content": text}] for text in expected]
    assert decode_completions(group, tokenizer) == expected


def test_messages_are_parsed_where_the_tokenizer_says_how():
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = qwen3_template
    messages = [{"role": "user", "content": "q"}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    texts = ["<think>\nEight times nine.\n</think>\nSo 72.", "So 72.", "<think>\nSo 72."]
    rows = [tokenizer(f"{text}<|im_end|>").input_ids for text in texts]
    group = Group(Prompt(start, {"prompt": messages}, 0), rows, [True] * 3)
    (thought,), (plain,), (cut,) = completions = decode_completions(group, tokenizer)
    assert thought["role"] == plain["role"] == "assistant"
    assert thought["reasoning_content"].strip() == "Eight times nine." and not plain.get("reasoning_content")
    assert cut["reasoning_content"].strip().startswith("So 72.")
    assert [text.strip() for text in completion_texts(completions)] == ["So 72.", "So 72.", ""]
    assert think_format(completions) == [1.0, 0.0, 0.0]  # what rewards read of the form is as it was written
    assert reasoning_accuracy(completions, answer=["72"] * 3) == [1.0, 0.0, 0.0]
    rows = [tokenizer("So 72.").input_ids, tokenizer("So 72.<|endoftext|>").input_ids]
    others = Group(group.prompt, rows, [False, True])  # a second EOS, which is none of the message either
    assert completion_texts(decode_completions(others, tokenizer)) == ["So 72."] * 2
    tokenizer.response_template = llama3_template  # whose tool calls end with a token that need not be the EOS
    call = '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    ((message,),) = decode_completions(Group(group.prompt, [tokenizer(call).input_ids], [True]), tokenizer)
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    group.prompt.example["prompt"] = "q"
    assert decode_completions(group, tokenizer) == texts


# ---- Logits that are not finite ----


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_a_distribution_are_marked_and_the_others_left_alone(value, greedy):
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([0.1, 0.5, 0.9])
    tokens, logps = sample(scores, u, greedy=greedy)
    broken = scores.clone()
    broken[1, 4] = value
    broken_tokens, broken_logps = sample(broken, u, greedy=greedy)
    assert broken_logps.isnan().tolist() == [False, True, False] and 0 <= broken_tokens[1] < 7
    assert torch.equal(broken_tokens[[0, 2]], tokens[[0, 2]]) and torch.equal(broken_logps[[0, 2]], logps[[0, 2]])


def diverged(kind="qwen3"):
    model = tiny_model(kind)
    model.lm_head.weight.data[5] = math.nan
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_policy_that_diverged_is_named(temperature):
    sampling = SamplingParams(2, 4, (IM_END,), PAD, seed=0, temperature=temperature)
    group = next(iter(make_engine("hf_generate", diverged()).generate(DRAWS, sampling)))
    with pytest.raises(
        FloatingPointError, match=r"not finite at token 0 of completion 0 of draw 0.*diverged.*grad_norm"
    ):
        check_finite(group)


def test_training_and_evaluation_stop_there(tmp_path):
    run = trainer(tmp_path, model=diverged(), beta=0.0, max_steps=1)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        run.train()
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        run.evaluate(run.train_dataset)
