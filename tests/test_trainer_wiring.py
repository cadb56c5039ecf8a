"""What is configured reaches the parts that do the work."""

import inspect
import logging

import pytest
import torch
from datasets import Dataset

import grpo_trl.collection
import grpo_trl.loader
import grpo_trl.trainer
from grpo_trl import GRPOTrainer
from grpo_trl.algorithm import AGGREGATIONS, SURROGATES, group_advantages
from grpo_trl.assembly import eval_sampling, train_sampling
from grpo_trl.batch import RolloutBatch
from grpo_trl.policy import evaluation_mode, per_token_logps
from tests.test_trainer import PROMPTS, adapter, config, dataset, logged, reward_vowels, trainer
from tests.test_trainer_gradients import gradients
from tests.tiny import ENDOFTEXT, IM_END, save, tiny_model, tiny_reward_model, tiny_tokenizer


def record(monkeypatch, owner, name) -> list[dict]:
    """The arguments, defaults included, of each call of `owner.name`, which still runs."""
    real, calls = getattr(owner, name), []
    signature = inspect.signature(real)

    def recording(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        by_name = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        calls.append(bound.arguments | bound.arguments.get(by_name, {}))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, recording)
    return calls


# ---- The objective ----

LOSS = {
    "surrogate": "own",
    "importance_sampling_level": "sequence",
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "delta": 1.5,
    "beta": 0.3,
    "kl_estimator": "k2",
}


def test_the_configured_objective_reaches_the_mathematics(tmp_path, monkeypatch):
    monkeypatch.setitem(SURROGATES, "own", SURROGATES["clip"])
    losses = record(monkeypatch, grpo_trl.trainer, "policy_loss")
    advantages = record(monkeypatch, grpo_trl.collection, "group_advantages")
    weights = record(monkeypatch, grpo_trl.loader, "token_weights")
    run = trainer(
        tmp_path, scale_rewards="none", token_weighting="max_length", mask_truncated_completions=True,
        num_generations=2, max_completion_length=6, num_iterations=2, max_steps=2, **LOSS,
    )  # fmt: skip
    batches = record(monkeypatch, RolloutBatch, "from_groups")
    run.train()
    assert len(losses) == 2
    for call in losses:
        assert {name: call[name] for name in LOSS} == LOSS
    assert [(call["num_generations"], call["scale_rewards"]) for call in advantages] == [(2, "none")]
    # the engine pads prompts alone before it samples; what was sampled is padded once
    assert [
        call["mask_truncated_completions"] for call in batches if any(map(len, call["groups"][0].completion_ids))
    ] == [True]
    assert {(call["token_weighting"], call["max_completion_length"]) for call in weights} == {("max_length", 6)}


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.5},
        {"epsilon_high": 0.5},
        {"delta": 1.0001},
        {"kl_estimator": "k2"},
        {"importance_sampling_level": "sequence"},
        {"scale_rewards": "none"},
        {"token_weighting": "sequence"},
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.1},
        {"advantage_baseline": "leave_one_out"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_choice_changes_the_gradient(tmp_path, change):
    """Of three passes over one rollout of ragged completions, in the second and third of which ratios have left 1."""
    base = {"num_iterations": 3, "max_steps": 3, "epsilon": 1e-3}
    if "delta" in change:  # the ratios that it bounds are above the clip range
        base["epsilon_high"] = 0.0
    plain, same, changed = (gradients(tmp_path, **base | options) for options in ({}, {}, change))
    assert all(map(torch.equal, plain, same))
    assert not torch.equal(plain[-1], changed[-1])


def test_what_is_compared_of_several_rewards_is_as_configured(tmp_path):
    def length(prompts, completions, **kwargs):
        return [float(len(text)) for text in completions]

    def ten_vowels(prompts, completions, **kwargs):
        return [10 * value for value in reward_vowels(completions)]

    advantages = {}
    for how in ("sum_then_normalize", "normalize_then_sum"):
        run = trainer(
            tmp_path, rewards=[ten_vowels, length], max_steps=1, multi_objective_aggregation=how,
            scale_rewards="none", reward_weights=[1.0, 0.5],
        )  # fmt: skip
        batch = next(iter(run.get_train_dataloader()))
        rewards = torch.cat([group.rewards_per_func for group in run.collected])
        compared = AGGREGATIONS[how](rewards, torch.tensor([1.0, 0.5]), 4)
        advantages[how] = group_advantages(compared, 4, "none")[: len(batch)]
        torch.testing.assert_close(batch.advantages, advantages[how])
    assert not torch.allclose(*advantages.values())


# ---- Log-probabilities: one temperature, dropout off ----


@pytest.mark.parametrize("model", ["full", "adapter"])
def test_policy_old_policy_and_reference_are_at_the_sampling_temperature(tmp_path, model):
    options = {"temperature": 0.6, "beta": 0.1, "num_iterations": 2, "max_steps": 2}
    run = trainer(tmp_path, peft=adapter(0) if model == "adapter" else None, **options)
    run.train()
    assert logged(run, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert logged(run, "importance_ratio/token")[0] == pytest.approx(1, abs=1e-6)
    assert logged(run, "sampling/logp_gap")[0] < 1e-4
    # the second pass is after an update: the quantities above are not constants
    assert logged(run, "kl")[1] > 1e-4 and abs(logged(run, "importance_ratio/token")[1] - 1) > 1e-4


def test_old_log_probabilities_are_taken_with_dropout_off(tmp_path):
    checked = []

    class Check(GRPOTrainer):
        def collect(self, prompts):
            self.model.train()  # as it is in all but the first rollout
            batch = super().collect(prompts)
            mask = batch.completion_mask.bool()
            with torch.no_grad():
                noisy, _ = per_token_logps(self.model, batch, temperature=self.args.temperature)
                with evaluation_mode(self.model):
                    exact, _ = per_token_logps(self.model, batch, temperature=self.args.temperature)
            gaps = [(batch.old_per_token_logps - logps)[mask].abs().max().item() for logps in (exact, noisy)]
            checked.append(gaps)
            return batch

    model = tiny_model("qwen3", attention_dropout=0.5)
    trainer(tmp_path, model=model, cls=Check, disable_dropout=False, num_iterations=2, max_steps=4).train()
    assert len(checked) == 2
    for to_exact, to_noisy in checked:
        assert to_exact < 1e-4 and to_noisy > 0.01  # dropout is on in the update


def with_dynamic_rope():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    return tiny_model("qwen3", rope_parameters=rope)


class Drifting(GRPOTrainer):
    """Says of its samples that they were likelier than they are."""

    drift = 0.0

    def sample(self, prompts):
        groups = super().sample(prompts)
        for group in groups:
            rows = group.sampling_per_token_logps
            group.sampling_per_token_logps = [[logp + self.drift for logp in row] for row in rows]
        return groups


class OwnRollout(GRPOTrainer):
    def rollout(self, prompts):
        return super().rollout(prompts)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.6}, None),  # the first rollout says
        ({"top_k": 5}, False),
        ({"sampler_correction": "token_truncate"}, False),
        ({"bf16": True}, False),
        ({"model": lambda: tiny_model("qwen3").bfloat16()}, False),
        ({"model": with_dynamic_rope}, False),
        ({"cls": OwnRollout}, False),
    ],
)
def test_which_samplers_may_stand_for_the_old_policy(tmp_path, options, expected):
    options = {"model": lambda: None} | options
    run = trainer(tmp_path, **options | {"model": options["model"]()}, num_iterations=2)
    assert run._sampling_is_exact is expected


@pytest.mark.parametrize(("drift", "far_elsewhere"), [(0.0, 0), (0.01, 0), (-0.01, 0), (0.0, 1)])
def test_the_first_rollout_of_all_ranks_says_whether_the_sampler_does(tmp_path, monkeypatch, drift, far_elsewhere):
    run = trainer(tmp_path, cls=Drifting, num_iterations=2)
    run.drift = drift
    counts = {(2, torch.long): torch.tensor([0, far_elsewhere])}  # of another rank: none of its own, tokens too far
    monkeypatch.setattr(run, "all_reduce", lambda x: x + counts.get((x.numel(), x.dtype), 0))
    batch = next(iter(run.get_train_dataloader()))
    assert run._sampling_is_exact is (not drift and not far_elsewhere)
    gap = (batch.sampling_per_token_logps - batch.old_per_token_logps)[batch.completion_mask.bool()]
    torch.testing.assert_close(gap, torch.full_like(gap, drift), atol=1e-4, rtol=0)


def test_a_correction_for_a_sampler_that_says_no_log_probabilities_is_refused(tmp_path):
    class Silent(GRPOTrainer):
        def sample(self, prompts):
            groups = super().sample(prompts)
            for group in groups:
                group.sampling_per_token_logps = None
            return groups

    with pytest.raises(ValueError, match=r"sampler_correction='token_mask' compares with .* the rollout gave none"):
        trainer(tmp_path, cls=Silent, sampler_correction="token_mask", max_steps=1).train()


def test_a_rollout_of_which_nothing_counts_does_not_say_whether_it_does(tmp_path):
    run = trainer(tmp_path, num_iterations=2, max_completion_length=1, mask_truncated_completions=True, seed=1)
    batch = next(iter(run.get_train_dataloader()))
    assert not batch.loss_mask.any() and run._sampling_is_exact is None


# ---- Sampling ----


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ([20, 21, 22], (IM_END, 20, 21, 22)),
        ([20, IM_END], (IM_END, 20)),
        (20, (IM_END, 20)),
        (None, (IM_END,)),
    ],
)
def test_every_eos_of_the_model_and_the_tokenizers_ends_a_completion(tmp_path, declared, expected):
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = declared
    params = train_sampling(config(tmp_path), model, tiny_tokenizer())
    assert params.eos_token_ids == expected == eval_sampling(config(tmp_path), params).eos_token_ids


def test_completions_of_a_run_end_at_any_eos(tmp_path):
    many = list(range(7, 260, 4))
    model = tiny_model("qwen3")
    model.generation_config.eos_token_id = many
    ends = []

    class Watch(GRPOTrainer):
        def sample(self, prompts):
            groups = super().sample(prompts)
            for group in groups:
                rows = zip(group.completion_ids, group.terminated, strict=True)
                ends.extend(ids[-1] for ids, terminated in rows if terminated)
            return groups

    trainer(tmp_path, model=model, cls=Watch, max_completion_length=16, num_iterations=1).train()
    assert len(set(ends) & set(many)) > 3 and set(ends) <= {*many, IM_END}


def test_a_model_without_any_eos_is_refused(tmp_path):
    model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Neither the tokenizer nor the model's generation config has an EOS token"):
        train_sampling(config(tmp_path), model, tokenizer)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, False),
        ({"temperature": 0.6}, False),
        ({"generation_kwargs": {"use_cache": True}}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"generation_kwargs": {"min_new_tokens": 2}}, True),
    ],
)
def test_a_sampler_that_is_not_the_policy_is_warned_of(tmp_path, caplog, options, warned):
    with caplog.at_level(logging.WARNING, logger="grpo_trl.assembly"):
        trainer(tmp_path, **options)
    assert ("change the sampling distribution" in caplog.text) is warned


def test_a_truncated_distribution_is_no_drift(tmp_path):
    run = trainer(tmp_path, num_iterations=1, off_policy_mask_threshold=0.5, top_k=5)
    run.train()
    assert set(logged(run, "off_policy_masked")) == {0.0}


# ---- Reward models ----


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """A saved reward model whose own tokenizer is one of text pairs."""
    return save(tiny_reward_model(), tiny_tokenizer(chat=False, pair=True), tmp_path_factory.mktemp("judge"))


def reward_run(path, rewards, tokenizers, **options) -> GRPOTrainer:
    return GRPOTrainer(
        tiny_model("qwen3"), rewards, config(path, **options), dataset(), processing_class=tiny_tokenizer(),
        reward_processing_classes=tokenizers,
    )  # fmt: skip


def test_one_tokenizer_serves_one_reward_model(tmp_path, judge):
    tokenizer = tiny_tokenizer(chat=False, pair=True)
    assert reward_run(tmp_path, [judge, "length"], tokenizer).scorer.reward_funcs[0].tokenizer is tokenizer
    with pytest.raises(ValueError, match="one tokenizer for several reward models; give a list with one each"):
        reward_run(tmp_path, [judge, judge], tokenizer)


class Logging:
    """A reward function that has a length, which is 0 at first."""

    __name__ = "logging"

    def __init__(self):
        self.log = []

    def __len__(self):
        return len(self.log)

    def __call__(self, completions, **kwargs):
        self.log += completions
        return [0.0] * len(completions)


def test_a_reward_that_is_false_is_one(tmp_path):
    assert reward_run(tmp_path, Logging(), None).reward_names == ["logging"]
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        reward_run(tmp_path, "", None)


def test_a_compiled_reward_model(tmp_path):
    compiled = torch.compile(tiny_reward_model(), backend="eager")
    run = reward_run(tmp_path, compiled, tiny_tokenizer(chat=False, pair=True), max_steps=1)
    run.train()
    assert logged(run, "reward")


def test_a_policy_that_is_wrapped_by_compile_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compiled by torch.compile\(model\).*torch_compile=True"):
        trainer(tmp_path, torch.compile(tiny_model("qwen3"), backend="eager"))


def test_options_of_reward_models_reach_them(tmp_path, judge):
    options = {
        "reward_batch_size": 3, "reward_max_length": 40, "reward_input_format": "text",
        "reward_model_init_kwargs": {"dtype": "bfloat16"}, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    (reward,) = reward_run(tmp_path, [judge], None, **options).scorer.reward_funcs
    assert (reward.batch_size, reward.max_length, reward.input_format) == (3, 40, "text")
    assert reward.model.dtype == torch.bfloat16 and reward.chat_template_kwargs == {"enable_thinking": False}
    (plain,) = reward_run(tmp_path, judge, None).scorer.reward_funcs
    assert (plain.batch_size, plain.max_length, plain.input_format) == (8, 1024, "pair")
    assert plain.model.dtype == torch.float32


def test_tokenizers_of_reward_models_reach_them(tmp_path, judge):
    own = tiny_tokenizer(chat=False, pair=True)
    run = reward_run(tmp_path, [judge, reward_vowels, judge], [own, None, None])
    first, _, second = run.scorer.reward_funcs
    assert first.tokenizer is own and second.tokenizer is not own


# ---- Devices ----


def device_of(module) -> str:
    (device,) = {parameter.device.type for parameter in module.parameters()}
    return device


@pytest.mark.parametrize("from_path", [False, True], ids=["instances", "paths"])
@pytest.mark.parametrize(("ref_device", "reward_device"), [("meta", "cpu"), ("cpu", "meta"), ("same", "auto")])
def test_frozen_models_are_placed_where_the_config_says(
    tmp_path, judge, model_dir, from_path, ref_device, reward_device
):
    """`meta` stands for a second device: weights that are there cannot be anywhere else."""
    run = GRPOTrainer(
        model_dir if from_path else tiny_model("qwen3"), judge if from_path else tiny_reward_model(),
        config(tmp_path, beta=0.1, ref_device=ref_device, reward_device=reward_device),
        Dataset.from_dict({"prompt": PROMPTS}), processing_class=tiny_tokenizer(),
        reward_processing_classes=tiny_tokenizer(chat=False, pair=True),
    )  # fmt: skip
    (reward,) = run.scorer.reward_funcs
    assert device_of(run.model) == "cpu"
    assert device_of(run.reference.model) == ("meta" if ref_device == "meta" else "cpu")
    assert device_of(reward.model) == ("meta" if reward_device == "meta" else "cpu")


def test_a_reference_of_its_own_path_is_placed_too(tmp_path, model_dir):
    run = trainer(tmp_path, ref_model_name_or_path=model_dir, ref_device="meta")
    assert device_of(run.model) == "cpu" and device_of(run.reference.model) == "meta"
    assert run.eval_sampling.eos_token_ids == run.train_sampling.eos_token_ids == (IM_END, ENDOFTEXT)
