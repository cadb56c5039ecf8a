"""Runs of `GRPOTrainer` with the packed learner and the native engine, against padded rows and `model.generate`."""

import pytest
import torch
from torch.optim import SGD

import grpo_trl.collection
from grpo_trl import GRPOTrainer
from grpo_trl.policy import causal_lm
from grpo_trl.rollouts.hf_generate import HFGenerateEngine
from grpo_trl.rollouts.native import NativeEngine
from tests.test_trainer import logged, reward_vowels, trainer, weights
from tests.tiny import tiny_model


class Recording(GRPOTrainer):
    """Keeps what was sampled, and counts the forward passes that score completions."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampled, self.scored = [], {"policy": 0, "reference": 0}
        models = {"policy": causal_lm(self.model)}
        if self.reference is not None and hasattr(self.reference, "model"):
            models["reference"] = causal_lm(self.reference.model)
        for name, model in models.items():
            model.register_forward_pre_hook(self._counter(name), with_kwargs=True)

    def _counter(self, name):
        def count(module, args, kwargs):
            self.scored[name] += "scored" in kwargs

        return count

    def sample(self, prompts):
        groups = super().sample(prompts)
        self.sampled += [group.completion_ids for group in groups]
        return groups


def run(path, model=None, **options):
    model = tiny_model("qwen3") if model is None else model
    # plain SGD: Adam would divide rounding by rounding
    result = trainer(path, model, cls=Recording, **options)
    result.optimizer = SGD(result.model.parameters(), lr=1e-2)
    result.train()
    return result


def padded_model():
    model = tiny_model("qwen3")
    model.set_attn_implementation("eager")  # which is not exchanged for ours
    return model


def assert_close(ours, expected, tolerance=1e-5):
    for name, weight in weights(expected).items():
        difference = (weights(ours)[name] - weight).norm()
        assert difference <= tolerance * weight.norm(), name
    for key in ("loss", "policy_loss", "kl", "entropy", "reward", "grad_norm", "completions/mean_length"):
        assert logged(ours, key) == pytest.approx(logged(expected, key), rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("options", [{"num_iterations": 1}, {"num_iterations": 3}, {"gradient_accumulation_steps": 2}])
def test_a_packed_run_is_a_padded_run(tmp_path, options):
    ours, expected = run(tmp_path / "ours", **options), run(tmp_path / "padded", padded_model(), **options)
    assert isinstance(ours.engine, NativeEngine) and isinstance(expected.engine, HFGenerateEngine)
    assert ours.sampled == expected.sampled and len(ours.sampled) > 1
    assert_close(ours, expected)


def test_the_engine_does_not_change_the_run(tmp_path):
    native, generate = (run(tmp_path / name, rollout_engine=name) for name in ("native", "hf_generate"))
    assert isinstance(generate.engine, HFGenerateEngine)
    assert native.sampled == generate.sampled
    assert_close(native, generate)


def test_a_cache_of_generate_means_generate(tmp_path):
    assert isinstance(trainer(tmp_path, cache_implementation="static").engine, HFGenerateEngine)


@pytest.mark.parametrize("max_tokens", [1, 60])
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_of_a_micro_batch_are_the_micro_batch(tmp_path, max_tokens, padded):
    models = [padded_model() if padded else tiny_model("qwen3") for _ in range(2)]
    options = {"per_device_train_batch_size": 8, "num_iterations": 2, "max_concurrent_rows": 4}
    ours = run(tmp_path / "pieces", models[0], max_tokens_per_microbatch=max_tokens, **options)
    expected = run(tmp_path / "whole", models[1], **options)
    assert ours.scored["policy"] > 2 * expected.scored["policy"]
    assert_close(ours, expected)


# ---- Nothing is computed that is not needed, and nothing twice ----


@pytest.mark.parametrize(
    ("options", "policy", "reference"),
    [
        # 4 optimizer steps of one micro-batch each
        ({"num_iterations": 1, "beta": 0.0}, 4, 0),
        ({"num_iterations": 1, "beta": 0.1}, 4, 4),
        # fp32: the sampler's log-probabilities are the old ones, if the first rollout shows that they are
        ({"num_iterations": 2, "beta": 0.1}, 4 + 1, 2),
        ({"num_iterations": 2, "beta": 0.1, "bf16": True}, 4 + 2, 2),
        ({"num_iterations": 2, "beta": 0.1, "top_k": 10}, 4 + 2, 2),  # the sampler's distribution is another
        ({"num_iterations": 4, "beta": 0.0, "bf16": True}, 4 + 1, 0),
        ({"num_iterations": 1, "beta": 0.1, "steps_per_generation": 2, "bf16": True}, 4 + 4, 4),
    ],
)
def test_forward_passes(tmp_path, options, policy, reference):
    assert run(tmp_path, **options).scored == {"policy": policy, "reference": reference}


@pytest.mark.parametrize("engine", ["native", "hf_generate"])
def test_sampling_log_probs_that_stand_for_the_old_ones(tmp_path, engine):
    result = run(tmp_path, num_iterations=2, beta=0.1, rollout_engine=engine, temperature=0.7)
    assert logged(result, "importance_ratio/token")[0] == pytest.approx(1, abs=1e-5)
    assert logged(result, "sampling/logp_gap")[0] < 1e-5
    assert logged(result, "kl")[0] == pytest.approx(0, abs=1e-9)


def test_sampling_log_probs_that_are_too_far_off_do_not_stand(tmp_path, monkeypatch):
    exact = run(tmp_path / "exact", num_iterations=2, beta=0.1)
    monkeypatch.setattr(grpo_trl.collection, "ROUNDING_GAP", 0.0)
    result = run(tmp_path, num_iterations=2, beta=0.1)
    assert result.scored == {"policy": 4 + 2, "reference": 2}
    assert logged(result, "importance_ratio/token")[0] == pytest.approx(1, abs=1e-7)
    assert_close(result, exact)


class OwnRollout(Recording):
    def rollout(self, prompts):
        for group in super().rollout(prompts):
            group.sampling_per_token_logps = [[-1.0] * len(ids) for ids in group.completion_ids]  # of another model
            yield group


def test_log_probs_of_an_overridden_rollout_are_not_trusted(tmp_path):
    result = trainer(tmp_path, cls=OwnRollout, num_iterations=2, beta=0.0)
    result.train()
    assert result.scored["policy"] == 4 + 2
    assert logged(result, "importance_ratio/token")[0] == pytest.approx(1, abs=1e-6)
    assert logged(result, "sampling/logp_gap")[0] > 0.1  # and the metric says that something is off


def test_the_gap_is_measured_before_the_policy_moves(tmp_path):
    result = run(tmp_path, num_iterations=4, max_steps=8)
    assert len(logged(result, "sampling/logp_gap")) == 2
    assert max(logged(result, "sampling/logp_gap")) < 1e-5


# ---- Models that cannot be packed ----


def test_a_model_with_a_sliding_window_is_trained_padded_and_said_so(tmp_path, caplog):
    result = trainer(tmp_path, tiny_model("gemma2"), max_steps=1)
    (sentence,) = [record.message for record in caplog.records if "padded rows" in record.message]
    assert sentence.endswith(
        "The policy is run on padded rows, each with its whole prompt, and sampled by model.generate: it has layers "
        "of the kind sliding_attention."
    )
    result.train()
    assert isinstance(result.engine, HFGenerateEngine)
    assert logged(result, "sampling/logp_gap")[0] < 1e-4


def test_generating_between_steps_does_not_disturb_them(tmp_path):
    """A callback that uses the model as any user would, with gradient checkpointing on."""

    class Uses(Recording):
        def training_step(self, model, inputs, num_items_in_batch=None):
            ids = torch.arange(10, 16)[None]
            with torch.no_grad():
                model(ids)
                causal_lm(model).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
            return super().training_step(model, inputs, num_items_in_batch)

    results = []
    for cls in (Recording, Uses):
        result = trainer(tmp_path, cls=cls, rewards=reward_vowels, gradient_checkpointing=True, max_steps=2)
        result.train()
        results.append(weights(result))
    for name, weight in results[0].items():
        assert torch.equal(results[1][name], weight)
