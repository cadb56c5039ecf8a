import inspect
import itertools
import math

import pytest
import torch

from grpo_trl.algorithm import KL_ESTIMATORS, SURROGATES, VARIANTS, policy_loss
from grpo_trl.algorithm.loss import (
    IMPORTANCE_SAMPLING_LEVELS,
    MAX_LOG_RATIO,
    off_policy_mask,
    sampler_correction_ratio,
)

LEVELS = IMPORTANCE_SAMPLING_LEVELS


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("token_truncate", [[0.5, 1.2, 3.0], [0.5, 0.5, 1.0]]),
        ("token_mask", [[0.0, 1.2, 0.0], [0.0, 0.5, 1.0]]),
        ("sequence_truncate", [[3.0] * 3, [0.5, 0.5, 1.0]]),  # 0.25 x 1.2 x 12 = 3.6; 0.1 x 0.5 = 0.05
        ("sequence_mask", [[0.0] * 3, [0.0, 0.0, 1.0]]),
    ],
)
def test_corrections_for_the_sampler_by_hand(correction, expected):
    ratios, mask = torch.tensor([[0.25, 1.2, 12.0], [0.1, 0.5, 1.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    found = sampler_correction_ratio(ratios.log(), mask, correction, 0.5, 3.0)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_completions_that_drifted_by_hand():
    """By more than the threshold, per token of their own; only those with negative advantage."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    gap, advantages = torch.tensor([[0.25] * 4, [0.5, 0, 0, 0], [0.5, 0, 0, 0]]), torch.tensor([-1.0, -1.0, 1.0])
    kept = off_policy_mask(gap, advantages[:, None].expand(3, 4), mask, 0.25)
    assert kept[mask].tolist() == [True] * 4 + [False, True]
    mixed = torch.tensor([[1.0, 1.0, -1.0, 1.0]])  # an advantage per token
    assert off_policy_mask(torch.ones(1, 4), mixed, mask[:1], 0.25).tolist() == [[True, True, False, True]]
    assert off_policy_mask(0 * gap, -torch.ones(3, 4), mask, 0.0).all()  # on-policy


def assert_close(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def loss_of_ratios(ratios, advantages, **options):
    """Loss and gradient by log-probability where pi / pi_old is `ratios` (B, T), every token with weight 1."""
    ratios = torch.tensor(ratios, dtype=torch.float64)
    old = torch.full_like(ratios, -1.5)
    logps = (old + ratios.log()).requires_grad_()
    ones = torch.ones_like(ratios)
    inputs = {"advantages": torch.as_tensor(advantages).double(), "token_weights": ones, "loss_mask": ones}
    loss, metrics = policy_loss(logps, old_per_token_logps=old, **(inputs | options))
    return loss.detach(), torch.autograd.grad(loss, logps)[0], metrics


def mean_of(metrics, name):
    total, count = metrics[name]
    return (total / count).item()


# --- the surrogate ---------------------------------------------------------------------------------------------------


def test_on_policy_loss_is_minus_the_weighted_advantages():
    logps = torch.tensor([[-0.5, -1.0], [-2.0, -0.1]], requires_grad=True)
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    advantages = torch.tensor([2.0, -1.0])
    loss, metrics = policy_loss(logps, advantages=advantages, token_weights=weights, loss_mask=torch.ones(2, 2))
    assert_close(loss, -(0.1 * 2 + 0.2 * 2 - 0.3 - 0.4))
    # on-policy the gradient is REINFORCE's, -w A for each log-probability: it is not lost with the ratio of 1
    assert_close(torch.autograd.grad(loss, logps)[0], [[-0.2, -0.4], [0.3, 0.4]])
    assert mean_of(metrics, "importance_ratio/token") == 1
    assert mean_of(metrics, "policy_loss") == loss.item()
    assert "kl" not in metrics


def test_loss_is_about_zero_on_policy_for_a_standardised_group():
    weights = torch.full((4, 1), 0.25)
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    loss, _ = policy_loss(torch.zeros(4, 1), advantages=advantages, token_weights=weights, loss_mask=weights > 0)
    assert loss.item() == 0


def test_symmetric_clip():
    # A > 0: min(r, 1.2); A < 0: max(r, .8)
    ratios = [[0.5, 1.0, 1.1, 1.5], [0.5, 1.0, 0.9, 1.5]]
    loss, gradient, metrics = loss_of_ratios(ratios, [2.0, -1.0], epsilon=0.2)
    assert_close(loss, -2 * (0.5 + 1.0 + 1.1 + 1.2) + (0.8 + 1.0 + 0.9 + 1.5))
    # d loss / d logp = -r A inside the trust region or where the clip does not hold it back, else 0
    assert_close(gradient, [[-1.0, -2.0, -2.2, 0.0], [0.0, 1.0, 0.9, 1.5]])
    assert mean_of(metrics, "clip_ratio/high_mean") == 1 / 8
    assert mean_of(metrics, "clip_ratio/low_mean") == 1 / 8
    assert mean_of(metrics, "clip_ratio/region_mean") == 2 / 8
    assert metrics["clip_ratio/high_max"] == 1 / 4 and metrics["clip_ratio/low_min"] == 0  # of a completion


def test_asymmetric_clip():
    loss, gradient, metrics = loss_of_ratios([[1.25, 1.5], [0.75, 0.85]], [1.0, -1.0], epsilon=0.2, epsilon_high=0.28)
    assert_close(loss, -(1.25 + 1.28) + (0.8 + 0.85))
    assert_close(gradient, [[-1.25, 0.0], [0.0, 0.85]])
    assert mean_of(metrics, "clip_ratio/high_mean") == 1 / 4
    assert mean_of(metrics, "clip_ratio/low_mean") == 1 / 4


def test_epsilon_high_of_zero_is_not_the_default():
    loss, _, _ = loss_of_ratios([[1.1]], [1.0], epsilon=0.2, epsilon_high=0.0)
    assert_close(loss, -1.0)


def test_delta_bounds_the_loss_of_negative_advantages_only():
    ratios = [[10.0, 3.0], [10.0, 3.0]]
    loss, gradient, _ = loss_of_ratios(ratios, [1.0, -1.0], delta=4.0)
    assert_close(loss, -(1.2 + 1.2) + (4.0 + 3.0))
    assert_close(gradient, [[0.0, 0.0], [0.0, 3.0]])
    without, _, _ = loss_of_ratios(ratios, [1.0, -1.0])
    assert_close(without, -(1.2 + 1.2) + (10.0 + 3.0))


def test_per_token_advantages():
    loss, gradient, metrics = loss_of_ratios([[1.0, 1.5, 1.5]], [[1.0, -2.0, 3.0]])
    assert_close(loss, -1.0 + 3.0 - 3.6)
    assert_close(gradient, [[-1.0, 3.0, 0.0]])
    assert mean_of(metrics, "clip_ratio/high_mean") == pytest.approx(1 / 3)


@pytest.mark.parametrize("level", LEVELS)
def test_advantages_per_row_equal_the_same_per_token(level):
    ratios = [[0.7, 1.1, 1.4], [0.7, 1.1, 1.4]]
    per_row = loss_of_ratios(ratios, [1.0, -2.0], importance_sampling_level=level)
    per_token = loss_of_ratios(ratios, [[1.0] * 3, [-2.0] * 3], importance_sampling_level=level)
    assert_close(per_row[0], per_token[0], 0)
    assert_close(per_row[1], per_token[1], 0)


def test_completions_that_drifted_are_counted_as_completions():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    ratios = [[0.5] * 3, [1.0] * 3, [0.5] * 3]
    loss, _, metrics = loss_of_ratios(ratios, [-1.0, -1.0, -1.0], loss_mask=mask, off_policy_mask_threshold=0.1)
    assert_close(loss, 1.0)
    assert [float(value) for value in metrics["off_policy_masked"]] == [1, 2]


def test_what_the_sampler_did_not_say_is_no_difference():
    sampled = torch.tensor([[math.nan, -2.0]]).double()  # the old ones are -1.5
    options = {"sampling_per_token_logps": sampled, "sampler_correction": "token_truncate"}
    loss, _, _ = loss_of_ratios([[1.0, 1.0]], [-1.0], **options)
    assert_close(loss, 1 + math.exp(0.5))


def test_the_smallest_and_largest_correction_are_of_tokens_that_count():
    mask, sampled = torch.tensor([[1, 1, 0]]), -1.5 - torch.tensor([[2.0, 3.0, 5.0]]).double().log()
    options = {"sampling_per_token_logps": sampled, "sampler_correction": "token_truncate"}
    _, _, metrics = loss_of_ratios([[1.0] * 3], [1.0], loss_mask=mask, **options)
    found = [metrics[f"sampling/importance_sampling_ratio/{name}"].item() for name in ("min", "max")]
    assert found == pytest.approx([2, 3]) and mean_of(metrics, "sampling/importance_sampling_ratio/mean") == 2.5


def test_cispo_counts_tokens_above_its_bound_where_the_advantage_is_positive():
    _, _, metrics = loss_of_ratios([[6.0, 1.0]] * 2, [1.0, -1.0], surrogate="cispo", epsilon_high=5.0)
    assert mean_of(metrics, "cispo_clip_ratio") == 1 / 4


# --- the ratio -------------------------------------------------------------------------------------------------------


def test_sequence_ratio_is_the_geometric_mean():
    # (1.1 x 1.2) ^ (1/2) = 1.148913; the second row has one token
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss, gradient, metrics = loss_of_ratios(
        [[1.1, 1.2], [0.9, 7.0]], [1.0, -1.0], loss_mask=mask, importance_sampling_level="sequence"
    )
    ratio = math.sqrt(1.1 * 1.2)
    assert_close(loss, -2 * ratio + 0.9)
    # the row's two tokens each have the ratio, and each log-probability moves it by 1 / length
    assert_close(gradient, [[-ratio, -ratio], [0.9, 0.0]])
    assert mean_of(metrics, "importance_ratio/sequence_mean") == pytest.approx((ratio + 0.9) / 2)
    assert mean_of(metrics, "importance_ratio/sequence_product") == pytest.approx((1.1 * 1.2 + 0.9) / 2)
    assert mean_of(metrics, "importance_ratio/token") == pytest.approx((1.1 + 1.2 + 0.9) / 3)


def test_sequence_clip_is_of_the_whole_completion():
    # tokens of 2 and .5 cancel: the token level clips the first, the sequence level (ratio 1) nothing
    token_loss, _, _ = loss_of_ratios([[2.0, 0.5]], [1.0])
    sequence_loss, _, metrics = loss_of_ratios([[2.0, 0.5]], [1.0], importance_sampling_level="sequence")
    assert_close(token_loss, -(1.2 + 0.5))
    assert_close(sequence_loss, -2.0)
    assert mean_of(metrics, "clip_ratio/region_mean") == 0


def test_sequence_ratio_does_not_collapse_with_length():
    _, _, metrics = loss_of_ratios([[0.99] * 500], [1.0], importance_sampling_level="sequence")
    assert mean_of(metrics, "importance_ratio/sequence_mean") == pytest.approx(0.99)
    assert mean_of(metrics, "importance_ratio/sequence_product") == pytest.approx(0.99**500, rel=1e-5)  # 0.0066


@pytest.mark.parametrize("epsilon_high", [None, 0.28])
@pytest.mark.parametrize("delta", [None, 2.0])
def test_sequence_level_equals_token_level_on_one_token_completions(epsilon_high, delta):
    ratios = [[0.3], [0.9], [1.25], [4.0]] * 2
    options = {"advantages": torch.tensor([1.0] * 4 + [-1.0] * 4), "epsilon_high": epsilon_high, "delta": delta}
    reference = torch.full((8, 1), -1.0, dtype=torch.float64)
    options |= {"beta": 0.1, "ref_per_token_logps": reference}
    token = loss_of_ratios(ratios, **options)
    sequence = loss_of_ratios(ratios, **options, importance_sampling_level="sequence")
    assert_close(sequence[0], token[0], 1e-12)
    assert_close(sequence[1], token[1], 1e-12)


def test_stored_old_log_probabilities_make_the_ratio():
    """After the first pass over a buffer, the ratio is against the policy that sampled, not against itself."""
    old = torch.tensor([[-1.0, -2.0]])
    logps = torch.tensor([[-0.9, -2.2]])
    inputs = {"advantages": torch.ones(1), "token_weights": torch.ones(1, 2), "loss_mask": torch.ones(1, 2)}
    _, first_pass = policy_loss(logps, **inputs)
    loss, second_pass = policy_loss(logps, old_per_token_logps=old, **inputs)
    assert mean_of(first_pass, "importance_ratio/token") == 1
    assert mean_of(second_pass, "importance_ratio/token") == pytest.approx((math.exp(0.1) + math.exp(-0.2)) / 2)
    assert_close(loss, -(math.exp(0.1) + math.exp(-0.2)))


# --- the KL penalty --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl_estimator", "expected"),
    [
        ("k1", math.log(2)),  # log pi/ref = log .5/.25
        ("k2", 0.5 * math.log(2) ** 2),
        ("k3", 0.5 + math.log(2) - 1),  # ref/pi - log ref/pi - 1
        ("k3_ratio", 1.25 * (0.5 + math.log(2) - 1)),  # times pi/old = .5/.4
    ],
)
def test_kl_estimators_by_hand(kl_estimator, expected):
    policy, old, reference = (torch.tensor([[p]]).double().log() for p in (0.5, 0.4, 0.25))
    loss, metrics = policy_loss(
        policy,
        old_per_token_logps=old,
        ref_per_token_logps=reference,
        advantages=torch.zeros(1),
        token_weights=torch.full((1, 1), 0.5),
        loss_mask=torch.ones(1, 1),
        beta=0.1,
        kl_estimator=kl_estimator,
    )
    assert_close(loss, 0.1 * 0.5 * expected)
    assert mean_of(metrics, "kl") == pytest.approx(expected)  # in nats per token: without beta and weights
    assert mean_of(metrics, "policy_loss") == 0


@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
def test_kl_is_exactly_zero_at_the_reference(kl_estimator):
    logps = torch.tensor([[-0.3, -4.2]], requires_grad=True)
    loss, metrics = policy_loss(
        logps,
        ref_per_token_logps=logps.detach(),
        advantages=torch.zeros(1),
        token_weights=torch.ones(1, 2),
        loss_mask=torch.ones(1, 2),
        beta=1.0,
        kl_estimator=kl_estimator,
    )
    assert loss.item() == 0
    assert metrics["kl"][0].item() == 0


# The exactly solvable toy: one token out of five. Expectations over the sampling policy are sums over the five tokens,
# one row each, weighted with their probabilities; so there is no sampling noise and errors can be held to 1e-9.
POLICY = torch.tensor([0.9, -0.4, 0.2, -1.3, 0.5], dtype=torch.float64)
REFERENCE = torch.tensor([-0.7, 0.8, 0.1, 0.6, -0.2], dtype=torch.float64)
STALE = torch.tensor([0.1, 0.3, -0.5, -0.2, 0.9], dtype=torch.float64)


def toy_gradients(sampler=None, **options):
    """Gradients by the logits: of the expected loss, and of the true reverse KL."""
    logits = POLICY.clone().requires_grad_()
    logps, reference = logits.log_softmax(0), REFERENCE.log_softmax(0)
    old = None if sampler is None else sampler.log_softmax(0)[:, None]
    weights = (logps.detach()[:, None] if old is None else old).exp()
    loss, _ = policy_loss(
        logps[:, None],
        old_per_token_logps=old,
        ref_per_token_logps=reference[:, None],
        advantages=torch.zeros(5),
        token_weights=weights,
        loss_mask=torch.ones(5, 1),
        beta=1.0,
        **options,
    )
    true_kl = (logps.exp() * (logps - reference)).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, true_kl)]
    return loss.detach(), true_kl.detach(), *gradients


@pytest.mark.parametrize(
    ("options", "sampler"),
    [({}, None), ({}, STALE), ({"kl_estimator": "k3_ratio"}, STALE), ({"kl_estimator": "k2"}, None)],
    ids=["default", "default off-policy", "k3_ratio off-policy", "k2"],
)
def test_gradient_is_that_of_the_reverse_kl(options, sampler):
    _, _, gradient, true_gradient = toy_gradients(sampler, **options)
    assert true_gradient.abs().max() > 0.3
    assert (gradient - true_gradient).abs().max() < 1e-9


@pytest.mark.parametrize("sampler", [None, STALE])
def test_default_estimator_has_the_value_of_the_reverse_kl(sampler):
    value, true_kl, _, _ = toy_gradients(sampler)
    assert_close(value, true_kl, 1e-9)


def test_k1_in_the_loss_does_not_regularise():
    value, true_kl, gradient, _ = toy_gradients(kl_estimator="k1")
    assert_close(value, true_kl, 1e-9)
    assert gradient.abs().max() < 1e-9


def test_k3_in_the_loss_has_another_gradient():
    value, true_kl, gradient, true_gradient = toy_gradients(kl_estimator="k3")
    assert_close(value, true_kl, 1e-9)
    assert (gradient - true_gradient).abs().max() > 0.1


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_other_estimators_are_biased_off_policy(kl_estimator):
    _, _, gradient, true_gradient = toy_gradients(STALE, kl_estimator=kl_estimator)
    assert (gradient - true_gradient).abs().max() > 0.1


def test_default_estimator_is_the_one_with_the_right_gradient():
    assert inspect.signature(policy_loss).parameters["kl_estimator"].default == "k3_ratio"
    assert VARIANTS["grpo"].kl_estimator == "k3_ratio"


def test_sequence_level_keeps_the_per_token_ratio_in_the_kl():
    ratios = [[0.7, 1.1, 1.6], [1.3, 0.8, 1.0]]
    reference = torch.tensor([[-1.0, -2.0, -0.5], [-1.7, -1.1, -3.0]]).double()

    def kl_part(level):
        options = {"advantages": torch.tensor([1.0, -1.0]), "importance_sampling_level": level}
        with_kl = loss_of_ratios(ratios, **options, beta=0.3, ref_per_token_logps=reference)
        without = loss_of_ratios(ratios, **options)
        return with_kl[0] - without[0], with_kl[1] - without[1]

    assert_close(kl_part("sequence")[0], kl_part("token")[0], 1e-12)
    assert_close(kl_part("sequence")[1], kl_part("token")[1], 1e-12)
    assert kl_part("token")[1].abs().min() > 1e-3


# --- parity with TRL 1.16 --------------------------------------------------------------------------------------------


def trl_loss(logps, old, ref, advantages, mask, *, epsilon, epsilon_high, delta, beta, bias_correction, loss_type):
    """`GRPOTrainer._compute_loss` of TRL 1.16 for one micro-batch per step, formula by formula."""
    coef_1 = torch.exp(logps - old)
    per_token_kl = torch.exp(ref - logps) - (ref - logps) - 1
    if bias_correction:
        per_token_kl = per_token_kl * coef_1
    coef_2 = torch.clamp(coef_1, 1 - epsilon, 1 + epsilon_high)
    if delta is not None:
        coef_1 = torch.clamp(coef_1, max=delta)
    advantages = advantages.unsqueeze(1)
    per_token_loss = -torch.min(coef_1 * advantages, coef_2 * advantages) + beta * per_token_kl
    if loss_type == "grpo":
        return ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    return (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize(("epsilon_high", "delta"), [(0.2, None), (0.28, None), (0.28, 1.5)])
def test_trl_parity(epsilon_high, delta, bias_correction, loss_type):
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(8, 6, generator=generator) * 3
    ref = old + 0.3 * torch.randn(8, 6, generator=generator)
    logps = (old + 0.3 * torch.randn(8, 6, generator=generator)).requires_grad_()
    advantages = torch.randn(8, generator=generator)
    mask = (torch.arange(6) < torch.tensor([6, 1, 3, 5, 2, 6, 4, 1])[:, None]).float()
    options = {"epsilon": 0.2, "epsilon_high": epsilon_high, "delta": delta, "beta": 0.05}
    expected = trl_loss(
        logps, old, ref, advantages, mask, **options, bias_correction=bias_correction, loss_type=loss_type
    )
    weights = mask / mask.sum() if loss_type == "dapo" else mask / mask.sum(1, keepdim=True) / len(mask)
    loss, metrics = policy_loss(
        logps,
        advantages=advantages,
        token_weights=weights,
        loss_mask=mask,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        kl_estimator="k3_ratio" if bias_correction else "k3",
        **options,
    )
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(expected, logps)[0])
    assert mean_of(metrics, "clip_ratio/region_mean") > 0.1  # so the clip was exercised


# --- numbers that must not break it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("level", LEVELS)
def test_extreme_log_ratios_stay_finite(level, kl_estimator, surrogate, dtype):
    for log_ratio, ref_log_ratio, advantage in itertools.product((-200.0, 200.0), (-200.0, 200.0), (-1.0, 1.0)):
        logps = torch.full((2, 3), -201.0, dtype=dtype, requires_grad=True)
        ones = torch.ones(2, 3)
        loss, metrics = policy_loss(
            logps,
            advantages=torch.full((2,), advantage),
            token_weights=ones / 6,
            loss_mask=ones,
            old_per_token_logps=logps.detach() - log_ratio,
            ref_per_token_logps=logps.detach() + ref_log_ratio,
            surrogate=surrogate,
            importance_sampling_level=level,
            beta=0.1,
            kl_estimator=kl_estimator,
        )
        (gradient,) = torch.autograd.grad(loss, logps)
        assert loss.isfinite() and gradient.isfinite().all()
        means = {name: value for name, value in metrics.items() if isinstance(value, tuple)}
        assert all(total.isfinite() for total, _ in means.values())
        extremes = {"clip_ratio/low_min", "clip_ratio/high_max"} if surrogate == "clip" else set()
        assert metrics.keys() - means.keys() == extremes


def test_clamp_is_far_outside_the_trust_region():
    _, gradient, _ = loss_of_ratios([[math.exp(MAX_LOG_RATIO - 1)]], [-1.0])
    assert_close(gradient / math.exp(MAX_LOG_RATIO - 1), [[1.0]])  # not yet clamped
    assert math.exp(MAX_LOG_RATIO) > 1e8


TENSORS = (
    "per_token_logps",
    "old_per_token_logps",
    "ref_per_token_logps",
    "advantages",
    "token_weights",
)


def ragged_inputs():
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    inputs = {name: torch.randn(3, 4, generator=generator) * 0.3 for name in TENSORS}
    inputs["token_weights"] = mask / 4
    return inputs | {"loss_mask": mask}


def loss_gradient_metrics(inputs, **options):
    inputs = dict(inputs)
    logps = inputs.pop("per_token_logps").clone().requires_grad_()
    loss, metrics = policy_loss(logps, **inputs, beta=0.1, **options)
    return loss.detach(), torch.autograd.grad(loss, logps)[0], metrics


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("poisoned", [*TENSORS, "all of them"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
def test_padded_places_do_not_matter(kl_estimator, level, poisoned, garbage):
    clean = ragged_inputs()
    padded = clean["loss_mask"] == 0
    names = TENSORS if poisoned == "all of them" else [poisoned]
    dirty = clean | {name: clean[name].masked_fill(padded, garbage) for name in names}
    options = {"importance_sampling_level": level, "kl_estimator": kl_estimator}
    loss, gradient, metrics = loss_gradient_metrics(dirty, **options)
    expected_loss, expected_gradient, expected_metrics = loss_gradient_metrics(clean, **options)
    assert_close(loss, expected_loss, 0)
    assert_close(gradient, expected_gradient, 0)
    assert gradient[padded].eq(0).all()
    assert metrics == expected_metrics


@pytest.mark.parametrize("advantage", [1.0, math.nan])
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_count(level, advantage):
    inputs = ragged_inputs()
    inputs |= {"loss_mask": torch.zeros(3, 4), "token_weights": torch.zeros(3, 4)}
    inputs["advantages"] = torch.full((3,), advantage)
    loss, gradient, metrics = loss_gradient_metrics(inputs, importance_sampling_level=level)
    assert loss.item() == 0
    assert gradient.eq(0).all()
    assert metrics.pop("clip_ratio/low_min") == math.inf and metrics.pop("clip_ratio/high_max") == -math.inf
    for name, (total, count) in metrics.items():
        assert total.item() == 0
        assert count.item() == (name == "policy_loss")


# --- metrics and errors ----------------------------------------------------------------------------------------------


def test_metrics_are_sums_and_counts_and_extremes():
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    reference = torch.full((3, 3), -1.5).double()  # so that log ref/pi = -log ratio
    ratios = [[1.5, 1.0, 0.5], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]]
    options = {"loss_mask": mask, "beta": 0.1, "ref_per_token_logps": reference, "kl_estimator": "k1"}
    loss, _, metrics = loss_of_ratios(ratios, [1.0, -1.0, 1.0], **options)
    policy_term = -(1.2 + 1.0 + 0.5) + 0.8
    kl = math.log(1.5) + 2 * math.log(0.5)
    product = 1.5 * 1.0 * 0.5
    expected = {
        "clip_ratio/low_mean": (1, 4),
        "clip_ratio/high_mean": (1, 4),
        "clip_ratio/region_mean": (2, 4),
        "importance_ratio/token": (1.5 + 1.0 + 0.5 + 0.5, 4),
        "importance_ratio/sequence_mean": (product ** (1 / 3) + 0.5, 2),
        "importance_ratio/sequence_product": (product + 0.5, 2),
        "kl": (kl, 4),
        "policy_loss": (policy_term, 1),
    }
    assert metrics.pop("clip_ratio/low_min").item() == 0  # the first completion has none
    assert metrics.pop("clip_ratio/high_max").item() == pytest.approx(1 / 3)
    assert metrics.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert metrics[name][0].item() == pytest.approx(total, abs=1e-6), name
        assert metrics[name][1].item() == count, name
    assert_close(loss, policy_term + 0.1 * kl)


def test_metrics_carry_no_graph():
    logps = torch.zeros(1, 2, requires_grad=True)
    ones = torch.ones(1, 2)
    _, metrics = policy_loss(
        logps, advantages=torch.ones(1), token_weights=ones, loss_mask=ones, ref_per_token_logps=ones, beta=0.1
    )
    values = [value for pair in metrics.values() for value in (pair if isinstance(pair, tuple) else [pair])]
    assert not any(value.requires_grad for value in values)


def test_beta_without_reference_is_refused():
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"beta=0\.1 needs ref_per_token_logps"):
        policy_loss(ones, advantages=torch.ones(1), token_weights=ones, loss_mask=ones, beta=0.1)


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="importance_sampling_level='tokens' is unknown; use one of token, sequence"):
        loss_of_ratios([[1.0]], [1.0], importance_sampling_level="tokens")
