"""transformers' continuous batching against our other engines and the training forward."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grpo_trl.batch import Prompt, RolloutBatch
from grpo_trl.policy import per_token_logps, prepare
from grpo_trl.rollouts import SamplingParams, make_engine
from tests.test_trainer import logged, trainer, weights
from tests.tiny import PAD, VOCAB_SIZE, tiny_model

MANY_EOS = tuple(range(1, VOCAB_SIZE, 8))
SAMPLING = SamplingParams(
    num_generations=4, max_completion_length=12, eos_token_ids=MANY_EOS, pad_token_id=PAD, seed=7
)
PROMPTS = [Prompt(list(range(10, 10 + length)), {"prompt": str(length)}, draw=length) for length in (7, 1, 3, 70)]


def rollout(model, sampling=SAMPLING, prompts=PROMPTS, **options):
    return list(make_engine("transformers_cb", model, **options).generate(prompts, sampling))


@pytest.mark.parametrize("rows", [None, 5])
def test_greedy_is_hf_generate(qwen3, rows):
    sampling = replace(SAMPLING, temperature=0.0)
    expected = list(make_engine("hf_generate", qwen3).generate(PROMPTS, sampling))
    for group, other in zip(rollout(qwen3, sampling, max_concurrent_rows=rows), expected, strict=True):
        assert group.prompt is other.prompt
        assert group.completion_ids == other.completion_ids and group.terminated == other.terminated


@pytest.mark.parametrize("lengths", [[1], [1, 1], [1, 3], [3, 1]])
@pytest.mark.parametrize("rows", [None, 4])
def test_prompts_of_one_token(qwen3, lengths, rows):
    prompts = [Prompt(list(range(9, 9 + length)), {}, draw) for draw, length in enumerate(lengths)]
    batch = RolloutBatch.from_groups(rollout(qwen3, prompts=prompts, max_concurrent_rows=rows), pad_token_id=PAD)
    logps, _ = per_token_logps(qwen3, batch)
    mask = batch.completion_mask.bool()
    torch.testing.assert_close(batch.sampling_per_token_logps[mask], logps[mask], rtol=0, atol=1e-4)
    assert len({tuple(ids) for ids in batch.completion_ids.tolist()}) > len(prompts)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3 with an adapter", "llama"])
def test_log_probabilities_are_the_trainers(kind, temperature):
    model = tiny_model(kind.split()[0])
    if "adapter" in kind:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    groups = rollout(model, replace(SAMPLING, temperature=temperature))
    batch = RolloutBatch.from_groups(groups, pad_token_id=PAD)
    logps, _ = per_token_logps(model, batch, temperature=temperature)
    mask = batch.completion_mask.bool()
    torch.testing.assert_close(batch.sampling_per_token_logps[mask], logps[mask], rtol=0, atol=1e-4)


def test_completions_end_at_the_first_eos_or_are_truncated(qwen3):
    groups = rollout(qwen3)
    for group in groups:
        assert len(group) == 4 and len({tuple(ids) for ids in group.completion_ids}) > 1
        for ids, terminated in zip(group.completion_ids, group.terminated, strict=True):
            assert not set(ids[:-1]) & set(MANY_EOS)
            assert terminated == (ids[-1] in MANY_EOS)
            assert terminated or len(ids) == SAMPLING.max_completion_length
    assert {flag for group in groups for flag in group.terminated} == {True, False}


def test_the_seed_decides_and_nothing_else_is_touched(qwen3):
    prepare(qwen3)
    qwen3.train()
    attention, state = qwen3.config._attn_implementation, torch.get_rng_state()
    first = rollout(qwen3)
    assert qwen3.training and qwen3.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert [group.completion_ids for group in rollout(qwen3)] == [group.completion_ids for group in first]
    other = rollout(qwen3, replace(SAMPLING, seed=8))
    assert [group.completion_ids for group in other] != [group.completion_ids for group in first]


def test_truncated_sampling_keeps_the_most_likely_token(qwen3):
    groups = rollout(qwen3, replace(SAMPLING, top_k=1))
    greedy = rollout(qwen3, replace(SAMPLING, temperature=0.0))
    assert [group.completion_ids for group in groups] == [group.completion_ids for group in greedy]


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.2}, {"generation_kwargs": {"min_new_tokens": 2}}])
def test_options_that_it_would_leave_out_are_refused(qwen3, options):
    with pytest.raises(ValueError, match=r"has no repetition_penalty.*use native or hf_generate"):
        rollout(qwen3, replace(SAMPLING, **options))


def test_a_model_without_its_attention_is_refused(qwen3):
    qwen3._supports_sdpa = False  # as that of Gemma 2 in transformers 5.23
    with pytest.raises(ValueError, match="samples with sdpa attention, and Qwen3ForCausalLM has none"):
        make_engine("transformers_cb", qwen3)


def test_a_run_under_autocast_decodes_in_the_dtype_of_the_weights(tmp_path):
    run = trainer(tmp_path, rollout_engine="transformers_cb", bf16=True, max_steps=2, num_iterations=1)
    forward = run.model.forward
    run.train()
    assert len(logged(run, "loss")) == 2 and max(logged(run, "sampling/logp_gap")) < 0.1
    assert run.model.forward is not forward and run.model.forward.__wrapped__  # accelerate's is back


def test_a_run(tmp_path):
    run = trainer(tmp_path, rollout_engine="transformers_cb", max_steps=2, num_iterations=1)
    before = weights(run)
    run.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights(run).items())
    gaps = logged(run, "sampling/logp_gap")
    assert len(gaps) == 2 and max(gaps) < 1e-4
