"""The objective. `policy_loss` first, then its parts in the order in which it calls them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    sampling_per_token_logps: Tensor | None = None,
    policy_mask: Tensor | None = None,
    surrogate: str = "clip",
    importance_sampling_level: str = "token",
    beta: float = 0.0,
    kl_estimator: str = "k3_ratio",
    off_policy_mask_threshold: float | None = None,
    sampler_correction: str | None = None,
    sampler_correction_min: float | None = None,
    sampler_correction_max: float | None = None,
    **surrogate_options: Any,
) -> tuple[Tensor, dict[str, Metric]]:
    """Policy-gradient loss with an optional KL penalty, already averaged by `token_weights`.

    Args:
        per_token_logps: (B, T), log-probabilities of the completion tokens under the policy, with gradient.
        advantages: (B,), or (B, T) for per-token advantages.
        token_weights: (B, T), from `token_weights`: the averaging rule, global over ranks and micro-batches.
        loss_mask: (B, T), 1 for tokens that count. Values elsewhere never matter, NaN included.
        old_per_token_logps: (B, T) under the policy that sampled; None when this step is on-policy (ratio 1).
        ref_per_token_logps: (B, T) under the reference; needed when `beta` is not 0.
        sampling_per_token_logps: (B, T) as the sampler gave them; needed by `sampler_correction`, and preferred to
            the old ones by `off_policy_mask_threshold`. NaN: unknown, taken for no difference.
        policy_mask: (B, T), 1 for tokens with a policy term (`top_entropy_mask`); they keep their KL term, and the
            denominators count them.
        surrogate: a name in `SURROGATES`.
        importance_sampling_level: "token", or "sequence": one ratio per completion (GSPO, arXiv 2507.18071, eq. 7).
        beta: weight of the KL penalty, in nats per token.
        kl_estimator: a name in `KL_ESTIMATORS`.
        off_policy_mask_threshold: see `off_policy_mask`.
        sampler_correction, sampler_correction_min, sampler_correction_max: see `sampler_correction_ratio`.
        surrogate_options: what the surrogate takes by name, e.g. epsilon; what it does not take has no effect.

    Returns:
        The scalar loss, and metrics of this micro-batch, detached: (sum, count) pairs for means, scalars for extremes.

    References: DeepSeekMath, arXiv 2402.03300, equations 3 and 4; PPO, arXiv 1707.06347, equation 7.
    """
    mask = loss_mask.bool()
    per_token_logps = torch.where(mask, per_token_logps, 0.0)
    old = per_token_logps.detach() if old_per_token_logps is None else torch.where(mask, old_per_token_logps, 0.0)
    log_ratio = per_token_logps - old
    advantages = torch.where(mask, advantages[:, None] if advantages.dim() == 1 else advantages, 0.0)
    sampler_gap = torch.zeros_like(old)  # log of old / sampled
    if sampling_per_token_logps is not None:
        sampler_gap = torch.where(mask, (old - sampling_per_token_logps).nan_to_num(0.0), 0.0)
    metrics = ratio_metrics(log_ratio.detach(), mask)

    correction = None
    if sampler_correction is not None:
        correction = sampler_correction_ratio(
            sampler_gap, mask, sampler_correction, sampler_correction_min, sampler_correction_max
        )
        metrics |= correction_metrics(correction, mask)
    ratio = importance_ratio(log_ratio, mask, importance_sampling_level)
    terms = Terms(per_token_logps, log_ratio, ratio, advantages, mask, correction)
    per_token_loss, found = SURROGATES[surrogate](terms, **surrogate_options)
    metrics |= found
    if correction is not None and surrogate not in CORRECTED:
        per_token_loss = per_token_loss * correction
    if off_policy_mask_threshold is not None:
        gap = (log_ratio.detach() + sampler_gap).neg()  # log of sampled / policy
        kept = off_policy_mask(gap, advantages, mask, off_policy_mask_threshold)
        metrics["off_policy_masked"] = _masked((~kept & mask).any(1), mask.any(1))
        per_token_loss = per_token_loss * kept
    if policy_mask is not None:
        per_token_loss = per_token_loss * policy_mask
    weights = torch.where(mask, token_weights, 0.0)
    loss = policy_term = (per_token_loss * weights).sum()

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


# What corrects for a sampler whose probabilities are not the policy's: name -> (per token or per completion, what
# happens to ratios beyond the bounds)
SAMPLER_CORRECTIONS = {
    "token_truncate": ("token", "truncate"),
    "token_mask": ("token", "mask"),
    "sequence_truncate": ("sequence", "truncate"),
    "sequence_mask": ("sequence", "mask"),
}


def sampler_correction_ratio(
    gap: Tensor, mask: Tensor, correction: str, low: float | None, high: float | None
) -> Tensor:
    """pi_old / pi_sampler as a factor of the policy term, (B, T), without gradient.

    Args:
        gap: (B, T), log of that ratio for each token, 0 outside the mask.
        correction: a name in `SAMPLER_CORRECTIONS`. The ratio of a completion is the product over its tokens. Ratios
            beyond the bounds are truncated to them (TIS), or become 0 (MIS, "IcePop").
        low, high: the bounds; None: none.

    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025); Liu et al.,
    "When Speed Kills Stability" (2025); TRL's `vllm_importance_sampling_mode`.
    """
    level, beyond = SAMPLER_CORRECTIONS[correction]
    if level == "sequence":
        gap = gap.sum(1, keepdim=True)
    ratio = _exp(gap.detach())
    if beyond == "truncate":
        ratio = ratio.clamp(low, high) if (low, high) != (None, None) else ratio
    else:
        outside = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
        ratio = ratio.masked_fill(outside, 0.0)
    return torch.where(mask, ratio.expand_as(mask), 1.0)


def correction_metrics(correction: Tensor, mask: Tensor) -> dict[str, Metric]:
    """Mean, smallest and largest correction for the sampler."""
    return {
        "sampling/importance_sampling_ratio/mean": _masked(correction, mask),
        "sampling/importance_sampling_ratio/min": torch.where(mask, correction, torch.inf).amin(),
        "sampling/importance_sampling_ratio/max": torch.where(mask, correction, -torch.inf).amax(),
    }


@dataclass(frozen=True)
class Terms:
    """What a surrogate may read, (B, T) each and 0 outside the mask."""

    logps: Tensor  # of the policy, with gradient
    log_ratio: Tensor  # policy / old, per token
    ratio: Tensor  # of the chosen level
    advantages: Tensor
    mask: Tensor
    correction: Tensor | None = None  # for the sampler


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
    terms: Terms, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float | None = None, **_: Any
) -> tuple[Tensor, dict[str, Metric]]:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A); default: symmetric. `delta` bounds r in the unclipped
    branch, and so the loss for negative advantages. PPO equation 7; two-sided: arXiv 2505.07291, section 4.1."""
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    clipped_ratio = terms.ratio.clamp(1 - epsilon, 1 + epsilon_high)
    bounded_ratio = terms.ratio if delta is None else terms.ratio.clamp(max=delta)
    loss = -torch.minimum(bounded_ratio * terms.advantages, clipped_ratio * terms.advantages)
    return loss, clip_metrics(terms.ratio.detach(), terms.advantages, terms.mask, epsilon, epsilon_high)


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


def cispo(terms: Terms, *, epsilon_high: float = 5.0, **_: Any) -> tuple[Tensor, dict[str, Metric]]:
    """-min(r, epsilon_high) A log pi, the ratio without gradient: tokens beyond the bound keep theirs. MiniMax-M1,
    arXiv 2506.13585, equations 4 and 5, without a lower bound; `epsilon_high` bounds r itself (ScaleRL, arXiv
    2510.13786, and TRL), not r - 1."""
    ratio = terms.ratio.detach()
    clipped = (ratio > epsilon_high) & (terms.advantages > 0)
    loss = -ratio.clamp(max=epsilon_high) * terms.advantages * terms.logps
    return loss, {"cispo_clip_ratio": _masked(clipped, terms.mask)}


def sapo(
    terms: Terms, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, **_: Any
) -> tuple[Tensor, dict[str, Metric]]:
    """-(4 / tau) sigmoid(tau (r - 1)) A: a gate that closes smoothly, faster for negative advantages. SAPO,
    arXiv 2511.20347."""
    tau = torch.where(terms.advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -torch.sigmoid(tau * (terms.ratio - 1)) * 4 / tau * terms.advantages, {}


def vespo(
    terms: Terms,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    **_: Any,
) -> tuple[Tensor, dict[str, Metric]]:
    """-phi(W) A log pi, with phi(W) = e^lambda W^k e^(-lambda W) without gradient, W the product of the completion's
    ratios, k and lambda by the sign of A. VESPO, arXiv 2602.10693. The sampler's correction is a factor of W."""
    lowest = math.log(1e-8)
    with torch.no_grad():
        log_w = terms.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).sum(1, keepdim=True)
        if terms.correction is not None:
            log_w = log_w + (terms.correction.log().clamp(lowest, MAX_LOG_RATIO) * terms.mask).sum(1, keepdim=True)
        log_w = log_w.clamp(lowest, MAX_LOG_RATIO)
        positive = terms.advantages >= 0
        k = torch.where(positive, vespo_k_pos, vespo_k_neg)
        rate = torch.where(positive, vespo_lambda_pos, vespo_lambda_neg)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
    return -phi * terms.advantages * terms.logps, {"vespo/phi_seq_mean": _masked(phi, terms.mask)}


# name -> (terms, options by name) -> per-token loss (B, T) and metrics
SURROGATES: dict[str, Callable[..., tuple[Tensor, dict[str, Metric]]]] = {
    "clip": clipped_surrogate,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
}
CORRECTED = {"vespo"}  # use the correction for the sampler by themselves


def off_policy_mask(gap: Tensor, advantages: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """False where the advantage is negative in completions that have drifted: whose mean log(pi_sampled / pi) per
    token is above the threshold, in nats. (B, T), from gap, advantages and mask (B, T). DeepSeek-V3.2, arXiv
    2512.02556, "Off-Policy Sequence Masking"."""
    drift = (gap * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return (advantages >= 0) | (drift <= threshold)


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


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _masked(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the values under the mask."""
    return torch.where(mask, values, 0).sum(dtype=torch.float32), mask.sum(dtype=torch.float32)
