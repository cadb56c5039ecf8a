"""Rewards -> advantages. Everything is relative to the group: the G completions of one prompt."""

from collections.abc import Callable

import torch
from torch import Tensor

SCALE_REWARDS = ("batch_relative", "group", "batch", "none")
EPSILON = 1e-4  # added to the standard deviation, as in TRL


def combine_rewards(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over reward functions. (B, F), (F,) -> (B,) in fp32.

    NaN means "not applicable" and is left out of the sum; a row where no function with a weight applies stays NaN.
    """
    # of fp64 values and in fp64: in fp32 .6 + .1 and .7 + 0 differ, and the difference would be taken for a signal
    total = (rewards_per_func.double() * weights.double()).nansum(1).float()
    applies = ~rewards_per_func.isnan() & (weights != 0)
    return torch.where(applies.any(1), total, torch.nan)


def passed(rewards_per_func: Tensor, weights: Tensor, threshold: float) -> Tensor:
    """Which completions are right: 1 where the weighted rewards reach the threshold, else 0; NaN where no function
    applies. (B, F), (F,) -> (B,).

    Negative ones are left out of the sum: they are penalties (DAPO's for length, arXiv 2503.14476, section 3.4, say),
    under which a right answer is still right.
    """
    credit = combine_rewards((rewards_per_func * weights).clamp(min=0), (weights != 0).to(weights.dtype))
    return torch.where(credit.isnan(), torch.nan, (credit >= threshold).to(credit.dtype))


def decoupled_rewards(rewards_per_func: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """Weighted sum of rewards that are normalised within their groups first, each function by itself: one with a
    wide range does not drown the others. (B, F), (F,) -> (B,). GDPO, arXiv 2601.05242; its last step,
    the normalisation over the batch, is `scale_rewards="batch_relative"`.

    NaN as in `combine_rewards`.
    """
    normalised = [
        group_advantages(rewards, num_generations, "group").masked_fill(rewards.isnan(), torch.nan)
        for rewards in rewards_per_func.T
    ]
    return combine_rewards(torch.stack(normalised, dim=1), weights)


# What of the F rewards of a completion is compared: name -> ((B, F), weights (F,), G) -> (B,)
AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "sum_then_normalize": lambda rewards_per_func, weights, num_generations: combine_rewards(
        rewards_per_func, weights
    ),
    "normalize_then_sum": decoupled_rewards,
}
BASELINES = ("group_mean", "leave_one_out")


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    scale_rewards: str = "batch_relative",
    *,
    baseline: str = "group_mean",
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Reward minus a baseline from its group, scaled.

    Args:
        rewards: (B,), groups contiguous. NaN rows get advantage 0 and do not move the mean of their group.
        num_generations: G, at least 2.
        scale_rewards: what the relative rewards are divided by (sample standard deviation + 1e-4):
            "batch_relative" - that of the relative rewards over all rows of all ranks (global standardisation; their
            mean is 0 by construction, so there is nothing to subtract);
            "group" - that of the group's rewards (DeepSeekMath, arXiv 2402.03300, section 4.1.2);
            "batch" - that of the raw rewards over all rows of all ranks (TRL's meaning);
            "none" - nothing (Dr. GRPO, arXiv 2503.20783).
        baseline: "group_mean", or "leave_one_out": the mean of the other completions, n / (n - 1) times as far away
            (RLOO, arXiv 2402.14740).
        all_reduce: sums a tensor over ranks.

    Returns:
        (B,) fp32. A group of equal rewards gives exactly 0, whatever its value: floating-point noise in its mean
        would otherwise be scaled up (16 x 0.95 has a standard deviation of 6e-8 in fp32).

    Raises:
        ValueError: G < 2, B not a multiple of G, or an unknown `scale_rewards` or `baseline`.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r} is unknown; use one of {', '.join(BASELINES)}.")
    groups = split_groups(rewards, num_generations)
    relative = relative_rewards(groups)
    if baseline == "leave_one_out":
        count = groups.isfinite().sum(1, keepdim=True)
        relative = relative * count / (count - 1).clamp(min=1)
    if scale_rewards == "none":
        scaled = relative
    elif scale_rewards == "group":
        scaled = relative / (_std(groups, groups.isfinite(), dim=1) + EPSILON)
    elif scale_rewards in ("batch", "batch_relative"):
        values = groups if scale_rewards == "batch" else relative
        scaled = relative / (_std(values, groups.isfinite(), all_reduce=all_reduce) + EPSILON)
    else:
        raise ValueError(f"scale_rewards={scale_rewards!r} is unknown; use one of {', '.join(SCALE_REWARDS)}.")
    return scaled.flatten().float()


def informative_groups(rewards: Tensor, num_generations: int, tolerance: float = 0.0) -> Tensor:
    """(B,) -> (B / G,) bool: False where all rewards of a group are equal (by equality, not by std > 0), or where
    fewer than two completions have a reward. Such a group carries no gradient. With a tolerance also where largest
    and smallest differ by no more than that share of the group's largest absolute reward."""
    groups = split_groups(rewards, num_generations)
    return _spread(groups) > tolerance * groups.nan_to_num(0.0).abs().amax(1)


def split_groups(rewards: Tensor, num_generations: int) -> Tensor:
    """(B,) -> (B / G, G) in fp64."""
    if num_generations < 2:
        raise ValueError(f"num_generations={num_generations}: a group needs at least 2 completions to compare.")
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of num_generations={num_generations}.")
    return rewards.double().view(-1, num_generations)


def relative_rewards(groups: Tensor) -> Tensor:
    """R - mean of the group, (groups, G); exactly 0 in groups of equal rewards and for missing rewards."""
    relative = groups - groups.nanmean(1, keepdim=True)
    return torch.where((_spread(groups) > 0)[:, None], relative, 0.0).nan_to_num(0.0)


def _spread(groups: Tensor) -> Tensor:
    """Largest minus smallest reward of each group, missing ones left out."""
    missing = groups.isnan()
    largest = groups.masked_fill(missing, -torch.inf).amax(1)
    smallest = groups.masked_fill(missing, torch.inf).amin(1)
    return largest - smallest


def _std(
    values: Tensor, valid: Tensor, dim: int | None = None, all_reduce: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Sample standard deviation (n - 1) of the valid values, over `dim` or over everything on every rank.
    0 where fewer than two values are valid."""
    values = torch.where(valid, values, 0.0)
    keep = {"dim": dim, "keepdim": True} if dim is not None else {}
    count = all_reduce(valid.sum(dtype=values.dtype, **keep))
    mean = all_reduce(values.sum(**keep)) / count.clamp(min=1)
    squares = all_reduce(torch.where(valid, (values - mean).square(), 0.0).sum(**keep))
    return (squares / (count - 1).clamp(min=1)).sqrt()
