"""The objective. `policy_loss` first, then its parts in the order in which it calls them."""

from collections.abc import Callable

import torch
from torch import Tensor

# exp(20) = 4.9e8: far outside any trust region and far inside fp32. Clamped before exp, because a log-ratio of 200
# overflows, and clamping afterwards leaves 0 x inf = NaN in the gradient.
MAX_LOG_RATIO = 20.0

Metric = tuple[Tensor, Tensor] | Tensor  # (sum, count) of a mean, or a minimum or maximum
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")


def policy_loss(
    per_token_logps: Tensor,
    *,
    advantages: Tensor,
    token_weights: Tensor,
    loss_mask: Tensor,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    surrogate: str = "clip",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3_ratio",
) -> tuple[Tensor, dict[str, Metric]]:
    """Clipped policy-gradient loss with an optional KL penalty, already averaged by `token_weights`.

    Args:
        per_token_logps: (B, T), log-probabilities of the completion tokens under the policy, with gradient.
        advantages: (B,), or (B, T) for per-token advantages.
        token_weights: (B, T), from `token_weights`: the averaging rule, global over ranks and micro-batches.
        loss_mask: (B, T), 1 for tokens that count. Values elsewhere never matter, NaN included.
        old_per_token_logps: (B, T) under the policy that sampled; None when this step is on-policy (ratio 1).
        ref_per_token_logps: (B, T) under the reference; needed when `beta` is not 0.
        surrogate: a name in `SURROGATES`.
        importance_sampling_level: "token", or "sequence": one ratio per completion (GSPO, arXiv 2507.18071, eq. 7).
        epsilon, epsilon_high: ratios are clipped to [1 - epsilon, 1 + epsilon_high]; default: symmetric.
        delta: upper bound on the ratio when the advantage is negative (two-sided clip, arXiv 2505.07291, section 4.1).
        beta: weight of the KL penalty, in nats per token.
        kl_estimator: a name in `KL_ESTIMATORS`.

    Returns:
        The scalar loss, and metrics of this micro-batch, detached: (sum, count) pairs for means, scalars for extremes.

    References: DeepSeekMath, arXiv 2402.03300, equations 3 and 4; PPO, arXiv 1707.06347, equation 7.
    """
    mask = loss_mask.bool()
    per_token_logps = torch.where(mask, per_token_logps, 0.0)
    old = per_token_logps.detach() if old_per_token_logps is None else torch.where(mask, old_per_token_logps, 0.0)
    log_ratio = per_token_logps - old
    advantages = torch.where(mask, advantages[:, None] if advantages.dim() == 1 else advantages, 0.0)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high

    ratio = importance_ratio(log_ratio, mask, importance_sampling_level)
    per_token_loss = SURROGATES[surrogate](ratio, advantages, epsilon, epsilon_high, delta)
    weights = torch.where(mask, token_weights, 0.0)
    loss = policy_term = (per_token_loss * weights).sum()

    metrics = clip_metrics(ratio.detach(), advantages, mask, epsilon, epsilon_high)
    metrics |= ratio_metrics(log_ratio.detach(), mask)
    if beta != 0.0:
        if ref_per_token_logps is None:
            raise ValueError(f"beta={beta} needs ref_per_token_logps; got None. Pass them, or set beta=0.")
        ref_log_ratio = torch.where(mask, ref_per_token_logps, 0.0) - per_token_logps
        # always the per-token ratio: a sequence-level one would add a spurious gradient term (huggingface/trl#6586)
        per_token_kl = KL_ESTIMATORS[kl_estimator](ref_log_ratio, _exp(log_ratio))
        loss = policy_term + beta * (per_token_kl * weights).sum()
        metrics["kl"] = _masked(per_token_kl.detach(), mask)
    metrics["policy_loss"] = (policy_term.detach(), torch.ones_like(policy_term))
    return loss, metrics


def importance_ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """pi_theta / pi_old, (B, T). "token": per token. "sequence": exp of the mean log-ratio of the completion, the same
    for each of its tokens (the geometric mean; a product over tokens would collapse with length)."""
    if level not in IMPORTANCE_SAMPLING_LEVELS:
        names = ", ".join(IMPORTANCE_SAMPLING_LEVELS)
        raise ValueError(f"importance_sampling_level={level!r} is unknown; use one of {names}.")
    if level == "sequence":
        mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return _exp(mean).expand_as(log_ratio)
    return _exp(log_ratio)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float, delta: float | None
) -> Tensor:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), elementwise over (B, T). `delta` bounds r in the unclipped
    branch, and so the loss for negative advantages. PPO equation 7; arXiv 2505.07291, section 4.1."""
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    bounded_ratio = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(bounded_ratio * advantages, clipped_ratio * advantages)


SURROGATES: dict[str, Callable[..., Tensor]] = {"clip": clipped_surrogate}


def kl_k1(ref_log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """log(pi / ref). Unbiased value, but as a loss term its expected gradient is zero: it does not regularise."""
    return -ref_log_ratio


def kl_k2(ref_log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """0.5 log(pi / ref)^2. Biased value; its expected gradient is that of the reverse KL when on-policy."""
    return 0.5 * ref_log_ratio.square()


def kl_k3(ref_log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """ref/pi - log(ref/pi) - 1. Unbiased value on-policy; its gradient is not that of the reverse KL.
    DeepSeekMath equation 4; Schulman, "Approximating KL divergence" (2020)."""
    return _exp(ref_log_ratio) - ref_log_ratio - 1


def kl_k3_ratio(ref_log_ratio: Tensor, ratio: Tensor) -> Tensor:
    """k3 times the (differentiable) importance ratio: value and gradient are those of the reverse KL, off-policy too.
    DeepSeek-V3.2, arXiv 2512.02556; huggingface/trl#4638."""
    return ratio * kl_k3(ref_log_ratio, ratio)


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "k3_ratio": kl_k3_ratio,
}


def clip_metrics(
    ratio: Tensor, advantages: Tensor, mask: Tensor, epsilon: float, epsilon_high: float
) -> dict[str, Metric]:
    """Fractions of tokens whose gradient the clip removes: below (A < 0), above (A > 0), either; and the smallest and
    largest such fraction of a completion (infinite when there is no completion)."""
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    rows, lengths = mask.any(1), mask.sum(1).clamp(min=1)
    return {
        "clip_ratio/low_min": torch.where(rows, (low & mask).sum(1) / lengths, torch.inf).amin(),
        "clip_ratio/high_max": torch.where(rows, (high & mask).sum(1) / lengths, -torch.inf).amax(),
        "clip_ratio/low_mean": _masked(low, mask),
        "clip_ratio/high_mean": _masked(high, mask),
        "clip_ratio/region_mean": _masked(low | high, mask),
    }


def ratio_metrics(log_ratio: Tensor, mask: Tensor) -> dict[str, Metric]:
    """Mean importance ratio per token, and per completion as geometric mean and as product over its tokens."""
    rows = mask.any(1)
    total = (log_ratio * mask).sum(1)
    mean = total / mask.sum(1).clamp(min=1)
    return {
        "importance_ratio/token": _masked(_exp(log_ratio), mask),
        "importance_ratio/sequence_mean": _masked(_exp(mean), rows),
        "importance_ratio/sequence_product": _masked(_exp(total), rows),
    }


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _masked(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the values under the mask."""
    return torch.where(mask, values, 0).sum(dtype=torch.float32), mask.sum(dtype=torch.float32)
