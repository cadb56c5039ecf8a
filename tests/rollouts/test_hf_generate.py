from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor

from grpo_trl.batch import Prompt, RolloutBatch
from grpo_trl.policy import per_token_logps
from grpo_trl.rollouts import EVAL_STREAM, SamplingParams, make_engine
from grpo_trl.rollouts.hf_generate import completion_lengths
from tests.tiny import ENDOFTEXT, IM_END, PAD, VOCAB_SIZE, tiny_model

KINDS = ["qwen3", "llama", "gpt2"]
MANY_EOS = tuple(range(1, VOCAB_SIZE, 8))  # one token in eight ends a completion, so that lengths vary
SAMPLING = SamplingParams(
    num_generations=4, max_completion_length=12, eos_token_ids=MANY_EOS, pad_token_id=PAD, seed=7
)
PROMPTS = [
    Prompt([10, 11, 12, 13, 14, 15, 16], {"prompt": "long"}, draw=0),
    Prompt([200], {"prompt": "one token"}, draw=1),
    Prompt([30, 31, 32], {"prompt": "short"}, draw=2),
]


def rollout(model, prompts=PROMPTS, sampling=SAMPLING, **options):
    return list(make_engine("hf_generate", model, **options).generate(prompts, sampling))


def ids_of(groups):
    return {group.prompt.draw: group.completion_ids for group in groups}


# ---- What is sampled is a function of identity ----


@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_does_not_matter(kind):
    model = tiny_model(kind)
    together = rollout(model)
    for group in together:
        (alone,) = rollout(model, [group.prompt])
        assert alone.completion_ids == group.completion_ids
        assert alone.terminated == group.terminated
        for logps, expected in zip(alone.sampling_per_token_logps, group.sampling_per_token_logps, strict=True):
            assert logps == pytest.approx(expected, abs=1e-4)
    assert ids_of(rollout(model, PROMPTS[::-1])) == ids_of(together)


def test_a_larger_group_begins_with_the_smaller_one(qwen3):
    small, large = rollout(qwen3), rollout(qwen3, sampling=replace(SAMPLING, num_generations=6))
    assert [group.completion_ids for group in small] == [group.completion_ids[:4] for group in large]


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        ("qwen3", {"attention_dropout": 0.5}),
        ("gpt2", {"embd_pdrop": 0.5, "attn_pdrop": 0.5, "resid_pdrop": 0.5}),
    ],
)
def test_train_mode_and_dropout_do_not_matter(kind, dropout):
    model = tiny_model(kind, **dropout)
    expected = ids_of(rollout(model))
    model.train()
    # the dropout is real: the training forward does depend on it
    x = torch.arange(10, 20)[None]
    assert not torch.equal(model(x).logits, model(x).logits)
    assert ids_of(rollout(model)) == expected


def test_history_and_the_global_generator_do_not_matter(qwen3):
    torch.manual_seed(0)
    expected = ids_of(rollout(qwen3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    rollout(qwen3, sampling=replace(SAMPLING, stream=EVAL_STREAM, num_generations=2))  # an evaluation before
    assert ids_of(rollout(qwen3)) == expected
    assert torch.equal(torch.get_rng_state(), state)  # and what comes after is not affected either


@pytest.mark.parametrize("size", [1, 2])
def test_repeats_are_looked_for_in_the_row_and_not_in_its_padding(qwen3, size):
    """With a pad token that is EOS too, a padded row could never end."""
    eos = tuple(range(1, VOCAB_SIZE, 3))
    short, long = Prompt([10, 11], {}, 0), Prompt(list(range(10, 30)), {}, 1)
    sampling = replace(SAMPLING, eos_token_ids=eos, generation_kwargs={"no_repeat_ngram_size": size})
    pad = next(ids[-1] for ids in rollout(qwen3, [short], sampling)[0].completion_ids if ids[-1] in eos)
    sampling = replace(sampling, pad_token_id=pad)
    (alone,), (beside, _) = rollout(qwen3, [short], sampling), rollout(qwen3, [short, long], sampling)
    assert alone.completion_ids == beside.completion_ids
    assert any(ids[-1] == pad for ids in beside.completion_ids)
    for ids in alone.completion_ids:
        grams = [tuple([10, 11, *ids][i : i + size]) for i in range(len(ids) + 3 - size)]
        assert len(set(grams)) == len(grams)


def test_a_processor_may_give_another_dtype(qwen3):
    class Doubles(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.double()

    for engine in ("hf_generate", "native"):
        changed = make_engine(engine, qwen3).generate(PROMPTS, replace(SAMPLING, logits_processors=(Doubles(),)))
        assert ids_of(changed) == ids_of(rollout(qwen3))


def test_seed_draw_and_stream_matter(qwen3):
    (base,) = rollout(qwen3, PROMPTS[:1])
    for sampling in (replace(SAMPLING, seed=8), replace(SAMPLING, stream=EVAL_STREAM)):
        assert rollout(qwen3, PROMPTS[:1], sampling)[0].completion_ids != base.completion_ids
    again = Prompt(PROMPTS[0].ids, PROMPTS[0].example, draw=5)  # the same prompt, drawn once more
    assert rollout(qwen3, [again])[0].completion_ids != base.completion_ids


def test_groups_are_in_order_and_their_rows_differ(qwen3):
    groups = rollout(qwen3)
    assert [group.prompt for group in groups] == PROMPTS
    for group in groups:
        assert len(group) == 4
        assert len({tuple(ids) for ids in group.completion_ids}) == 4


# ---- Where a completion ends ----


@pytest.mark.parametrize("pad", [PAD, MANY_EOS[0]], ids=["own pad", "pad is eos"])
def test_first_eos_of_any_kind_ends_a_completion(qwen3, pad):
    sampling = replace(SAMPLING, num_generations=32, pad_token_id=pad)
    groups = rollout(qwen3, sampling=sampling)
    ends = set()
    for group in groups:
        for ids, terminated, logps in zip(
            group.completion_ids, group.terminated, group.sampling_per_token_logps, strict=True
        ):
            eos = [token in MANY_EOS for token in ids]
            assert eos[:-1] == [False] * (len(ids) - 1)
            assert terminated == eos[-1]
            assert terminated or len(ids) == SAMPLING.max_completion_length
            assert len(logps) == len(ids)
            ends |= {ids[-1]} & set(MANY_EOS)
    flags = [flag for group in groups for flag in group.terminated]
    assert True in flags and False in flags
    assert len(ends) > 5  # not only the first id of the list
    batch = RolloutBatch.from_groups(groups, pad_token_id=pad)
    in_loss = torch.isin(batch.completion_ids, torch.tensor(MANY_EOS)) & batch.loss_mask.bool()
    assert in_loss.sum(1).tolist() == [int(flag) for flag in flags]


def test_completions_do_not_depend_on_the_pad_token(qwen3):
    other = rollout(qwen3, sampling=replace(SAMPLING, pad_token_id=MANY_EOS[0]))
    assert ids_of(other) == ids_of(rollout(qwen3))


def test_completion_lengths():
    ids = torch.tensor([[5, 9, 5, 5], [5, 5, 8, 9], [5, 5, 5, 5], [8, 0, 0, 0]])
    lengths, terminated = completion_lengths(ids, (8, 9))
    assert lengths.tolist() == [2, 3, 4, 1]
    assert terminated.tolist() == [True, True, False, True]


# ---- Log-probabilities are those of the policy ----


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_logps_are_the_trainers(kind, temperature):
    model = tiny_model(kind)
    groups = rollout(model, sampling=replace(SAMPLING, temperature=temperature))
    batch = RolloutBatch.from_groups(groups, pad_token_id=PAD)
    logps, _ = per_token_logps(model, batch, temperature=temperature)
    mask = batch.completion_mask.bool()
    torch.testing.assert_close(batch.sampling_per_token_logps[mask], logps[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_generate_without_sampling(kind):
    model = tiny_model(kind)
    sampling = replace(SAMPLING, temperature=0.0, num_generations=2)
    for group in rollout(model, sampling=sampling):
        output = model.generate(
            torch.tensor([group.prompt.ids]),
            attention_mask=torch.ones(1, len(group.prompt.ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(MANY_EOS),
            pad_token_id=PAD,
        )
        assert group.completion_ids == [output[0, len(group.prompt.ids) :].tolist()] * 2


def test_truncation_keeps_the_most_likely_tokens(qwen3):
    groups = rollout(qwen3, sampling=replace(SAMPLING, top_k=1, num_generations=2))
    assert ids_of(groups) == ids_of(rollout(qwen3, sampling=replace(SAMPLING, temperature=0.0, num_generations=2)))
    assert all(logp == 0 for group in groups for row in group.sampling_per_token_logps for logp in row)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_repetition_penalty_ignores_the_padding(kind):
    # pad is EOS, as in many tokenizers: penalised in padded rows only, it would make their completions longer
    model = tiny_model(kind)
    eos = MANY_EOS[0]
    sampling = replace(SAMPLING, repetition_penalty=3.0, pad_token_id=eos, eos_token_ids=(eos,))
    together = rollout(model, sampling=sampling)
    for group in together:
        (alone,) = rollout(model, [group.prompt], sampling)
        assert alone.completion_ids == group.completion_ids
        for ids, logps in zip(group.completion_ids, group.sampling_per_token_logps, strict=True):
            expected = [penalised_logp(model, group.prompt.ids + ids[:t], ids[t], 3.0) for t in range(len(ids))]
            assert logps == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def penalised_logp(model, context, token, penalty):
    """Keskar et al. 2019 (arXiv 1909.05858), section 4.1, as transformers has it: of tokens seen, a positive logit is
    divided and a negative one multiplied."""
    logits = model(torch.tensor([context])).logits[0, -1].double()
    seen = torch.tensor(sorted(set(context)))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits.log_softmax(-1)[token].item()


# ---- Options ----


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_generation_config_of_the_model_does_not_leak_in(qwen3, adapter):
    model = get_peft_model(qwen3, LoraConfig(target_modules=["q_proj"])) if adapter else qwen3
    expected = rollout(model)
    config = qwen3.generation_config
    config.update(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        suppress_tokens=list(range(100)),
        num_beams=2,
        return_dict_in_generate=True,
        max_length=8,
        eos_token_id=[IM_END, ENDOFTEXT],
    )
    before = config.to_dict()
    assert rollout(model) == expected
    assert qwen3.generation_config is config
    assert config.to_dict() == before


def test_generation_kwargs_reach_generate(qwen3):
    assert min(len(ids) for group in rollout(qwen3) for ids in group.completion_ids) < 6
    groups = rollout(qwen3, sampling=replace(SAMPLING, generation_kwargs={"min_new_tokens": 6}))
    assert min(len(ids) for group in groups for ids in group.completion_ids) >= 6
    assert any(flag for group in groups for flag in group.terminated)


def test_generation_kwargs_win_over_our_defaults(qwen3):
    uncached = rollout(qwen3, sampling=replace(SAMPLING, generation_kwargs={"use_cache": False}))
    assert ids_of(uncached) == ids_of(rollout(qwen3))


def test_static_cache_gives_the_same(qwen3):
    assert ids_of(rollout(qwen3, cache_implementation="static")) == ids_of(rollout(qwen3))


def test_weights_that_are_synchronised_are_those_that_sample(qwen3):
    engine = make_engine("hf_generate", qwen3)
    other = tiny_model("qwen3", seed=1)
    engine.sync_weights(other)
    assert ids_of(engine.generate(PROMPTS, SAMPLING)) == ids_of(rollout(other)) != ids_of(rollout(qwen3))


def test_unknown_engine():
    with pytest.raises(
        ValueError, match=r"rollout_engine='magic' is unknown; use one of native, hf_generate, vllm, transformers_cb"
    ):
        make_engine("magic", torch.nn.Linear(1, 1))


# ---- The model is left as it was found ----


def mixed_modes(model):
    """A model in train mode of which two modules are not."""
    model.train()
    model.get_input_embeddings().eval()
    model.lm_head.eval()
    model.gradient_checkpointing_enable()
    return model


def state(model):
    return {
        name: (module.training, getattr(module, "gradient_checkpointing", None))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_checkpointing_are_restored(kind):
    model = mixed_modes(tiny_model(kind))
    before = state(model)
    assert {training for training, _ in before.values()} == {True, False}
    assert True in {checkpointing for _, checkpointing in before.values()}
    rollout(model)
    assert state(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modes_are_restored_after_an_exception(qwen3):
    model = mixed_modes(qwen3)
    before, config = state(model), model.generation_config
    calls = []

    def fail_in_the_third_step(module, args):
        calls.append(module.training)
        if len(calls) == 3:
            raise RuntimeError("out of memory, say")

    hook = model.model.register_forward_pre_hook(fail_in_the_third_step)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        rollout(model)
    hook.remove()
    assert calls == [False] * 3
    assert state(model) == before
    assert model.generation_config is config
    assert torch.is_grad_enabled()
    assert ids_of(rollout(model)) == ids_of(rollout(tiny_model("qwen3")))


@pytest.mark.parametrize("kind", KINDS)
def test_cache_is_used_with_gradient_checkpointing_in_train_mode(kind):
    model = mixed_modes(tiny_model(kind))
    model.config.use_cache = False  # as training code sets it
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    groups = rollout(model)
    steps = max(len(ids) for group in groups for ids in group.completion_ids)
    assert lengths == [7] + [1] * (steps - 1)


def test_adapter_takes_part(qwen3):
    plain = ids_of(rollout(qwen3))
    model = get_peft_model(qwen3, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    groups = rollout(model)
    assert ids_of(groups) != plain
    batch = RolloutBatch.from_groups(groups, pad_token_id=PAD)
    mask = batch.completion_mask.bool()
    logps, _ = per_token_logps(model, batch)
    torch.testing.assert_close(batch.sampling_per_token_logps[mask], logps[mask], rtol=0, atol=1e-5)
