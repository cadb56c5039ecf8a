"""The loss and its gradient are TRL's on the same tensors, for every `loss_type`; what differs on purpose is named."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close
from trl import GRPOTrainer

from grpo_trl.algorithm import (
    LOSS_TYPES,
    SAMPLER_CORRECTIONS,
    entropy_bonus,
    policy_loss,
    token_weights,
    top_entropy_mask,
)
from grpo_trl.algorithm.loss import sampler_correction_ratio

ROWS, LENGTH, LONGEST = 6, 7, 9
EPSILON, EPSILON_HIGH = 0.2, 0.28


@pytest.fixture(autouse=True)
def fp64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def tensors(seed=0):
    """Ragged rows; ratios from e^-1 to e, so on both sides of every clip range; advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.empty(ROWS, LENGTH).uniform_(low, high, generator=generator)

    logps = uniform(-3, -0.5)
    lengths = torch.tensor([LENGTH, 1, 3, 5, 2, 4])
    return SimpleNamespace(
        logps=logps,
        old=logps + uniform(-1, 1),
        ref=logps + uniform(-1, 1),
        sampled=logps + uniform(-1, 1),
        entropies=uniform(0.1, 3),
        mask=(torch.arange(LENGTH) < lengths[:, None]).long(),
        advantages=torch.tensor([1.3, -0.7, 0.0, -1.1, 0.4, 0.2]),
    )


def theirs(x, loss_type, level="token", beta=0.0, delta=None, correction=None, **options):
    """TRL's `_compute_loss`, with what it reads of its trainer."""
    options = {
        "use_bias_correction_kl": False,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "threshold": None,
    } | options
    trainer = object.__new__(GRPOTrainer)
    logps, entropies = x.logps.clone().requires_grad_(), x.entropies.clone().requires_grad_()
    settings = {
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: (logps, entropies, None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": options["top_entropy_quantile"],
        "off_policy_mask_threshold": options["threshold"],
        "importance_sampling_level": level,
        "beta": beta,
        "loss_type": loss_type,
        "epsilon_low": EPSILON,
        "epsilon_high": 1.5 if loss_type == "cispo" else EPSILON_HIGH,
        "use_vllm": correction is not None,
        "vllm_importance_sampling_correction": correction is not None,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "accelerator": Accelerator(cpu=True),
        "_entropy_bonus_enabled": options["entropy_coef"] != 0,
        "entropy_coef": options["entropy_coef"],
        "use_adaptive_entropy": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "args": SimpleNamespace(
            use_bias_correction_kl=options["use_bias_correction_kl"],
            delta=delta,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
    }
    for name, value in settings.items():
        object.__setattr__(trainer, name, value)
    inputs = {
        "prompt_ids": torch.zeros(len(x.mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(x.mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(x.mask),
        "completion_mask": x.mask,
        "advantages": x.advantages,
        "old_per_token_logps": x.old,
        "ref_per_token_logps": x.ref,
        "num_items_in_batch": x.mask.sum(),
    }
    if correction is not None:
        inputs |= {"importance_sampling_ratio": correction, "sampling_per_token_logps": x.sampled}
    loss = trainer._compute_loss(None, inputs)
    return loss.detach(), torch.autograd.grad(loss, (logps, entropies), allow_unused=True)


def ours(x, loss_type, level="token", beta=0.0, delta=None, kl="k3", quantile=1.0, entropy_coef=0.0, **options):
    logps, entropies = x.logps.clone().requires_grad_(), x.entropies.clone().requires_grad_()
    parts = dict(LOSS_TYPES[loss_type])

    def weights(weighting):
        return token_weights(x.mask, weighting, max_completion_length=LONGEST)

    policy_mask = top_entropy_mask(x.entropies, x.mask, quantile) if quantile < 1 else None
    loss, _ = policy_loss(
        logps,
        advantages=x.advantages,
        token_weights=weights(parts["token_weighting"]),
        loss_mask=x.mask,
        old_per_token_logps=x.old,
        ref_per_token_logps=x.ref,
        policy_mask=policy_mask,
        surrogate=parts["surrogate"],
        importance_sampling_level=level,
        epsilon=EPSILON,
        epsilon_high=1.5 if loss_type == "cispo" else EPSILON_HIGH,
        delta=delta,
        beta=beta,
        kl_estimator=kl,
        **options,
    )
    if entropy_coef:
        loss = loss - entropy_coef * entropy_bonus(entropies, weights("token"), x.mask, policy_mask)
    return loss.detach(), torch.autograd.grad(loss, (logps, entropies), allow_unused=True)


def assert_same(first, second):
    assert_close(first[0], second[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(first[1], second[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type, level, beta, delta):
    for seed in (0, 1):
        x = tensors(seed)
        expected = theirs(x, loss_type, level, beta, delta)
        assert_same(ours(x, loss_type, level, beta, delta), expected)
        assert expected[1][0].abs().max() > 1e-3


def test_they_are_all_of_trls():
    from trl import GRPOConfig

    text = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"'{name}'" in text or f"`{name}`" in text or name in text for name in LOSS_TYPES)
    losses = {name: ours(tensors(), name)[0].item() for name in LOSS_TYPES}
    assert len({round(loss, 6) for loss in losses.values()}) == len(LOSS_TYPES) - 1  # bnpo is dapo in one micro-batch
    assert losses["bnpo"] == losses["dapo"]


def test_the_kl_of_the_reverse_gradient_is_trls_bias_correction_per_token():
    x = tensors()
    expected = theirs(x, "grpo", beta=0.1, use_bias_correction_kl=True)
    assert_same(ours(x, "grpo", beta=0.1, kl="k3_ratio"), expected)


def test_difference_the_kl_keeps_the_token_ratio_at_sequence_level():
    """TRL multiplies it by the ratio of the sequence (huggingface/trl#6586)."""
    x = tensors()
    expected = theirs(x, "grpo", "sequence", beta=0.1, use_bias_correction_kl=True)
    loss, _ = ours(x, "grpo", "sequence", beta=0.1, kl="k3_ratio")
    assert abs(loss - expected[0]) > 1e-3
    token = ours(x, "grpo", beta=0.1, kl="k3_ratio")[0] - ours(x, "grpo")[0]
    assert_close(loss - ours(x, "grpo", "sequence")[0], token)


def test_difference_counts_are_those_of_the_optimizer_step():
    """TRL's bnpo averages the means of micro-batches: another gradient for another split of the same rows."""
    x = tensors()
    halves = [
        theirs(SimpleNamespace(**{name: value[rows] for name, value in vars(x).items()}), "bnpo")[0]
        for rows in ([0, 3, 5], [1, 2, 4])
    ]
    assert abs(sum(halves) / 2 - theirs(x, "bnpo")[0]) > 1e-3
    assert_close(ours(x, "bnpo")[0], theirs(x, "bnpo")[0])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "cispo", "sapo", "luspo"])
def test_top_entropy_tokens(loss_type):
    x = tensors()
    expected = theirs(x, loss_type, beta=0.1, top_entropy_quantile=0.3)
    assert_same(ours(x, loss_type, beta=0.1, quantile=0.3), expected)
    assert abs(expected[0] - theirs(x, loss_type, beta=0.1)[0]) > 1e-3


@pytest.mark.parametrize("quantile", [1.0, 0.3])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_entropy_bonus(loss_type, quantile):
    x = tensors()
    expected = theirs(x, loss_type, entropy_coef=0.05, top_entropy_quantile=quantile)
    assert_same(ours(x, loss_type, entropy_coef=0.05, quantile=quantile), expected)
    assert expected[1][1].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("loss_type", "correction"),
    [
        (loss_type, correction)
        for loss_type in ("grpo", "dapo", "cispo", "vespo")
        for correction in SAMPLER_CORRECTIONS
        if loss_type != "vespo" or correction.startswith("token")  # TRL has no others for it
    ],
)
def test_correction_for_the_sampler(loss_type, correction):
    x = tensors()
    gap = (x.old - x.sampled) * x.mask
    ratio = sampler_correction_ratio(gap, x.mask.bool(), correction, 0.5, 1.6)
    assert len(ratio[x.mask.bool()].unique()) > 2
    expected = theirs(x, loss_type, correction=ratio)
    options = {"sampler_correction": correction, "sampler_correction_min": 0.5, "sampler_correction_max": 1.6}
    assert_same(ours(x, loss_type, sampling_per_token_logps=x.sampled, **options), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_off_policy_sequences(threshold):
    x = tensors()
    ones = torch.ones_like(x.old)
    expected = theirs(x, "grpo", correction=ones, threshold=threshold)
    assert_same(ours(x, "grpo", sampling_per_token_logps=x.sampled, off_policy_mask_threshold=threshold), expected)
    assert abs(expected[0] - theirs(x, "grpo")[0]) > 1e-3
    # without the sampler's: by the old ones
    expected = theirs(x, "grpo", threshold=threshold)
    assert_same(ours(x, "grpo", off_policy_mask_threshold=threshold), expected)
