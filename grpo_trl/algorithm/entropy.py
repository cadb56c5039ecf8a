"""Entropies in the objective: which tokens have a policy term by them, and a bonus for them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def top_entropy_mask(
    entropies: Tensor, mask: Tensor, share: float, gather: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """True for the `share` of tokens with the highest entropy: "forking tokens" (arXiv 2506.01939, section 5).

    Args:
        entropies, mask: (B, T) of one micro-batch.
        share: in (0, 1], e.g. 0.2.
        gather: concatenates tensors of different lengths over ranks; the quantile is that of all of them.
    """
    mask = mask.bool()
    found = gather(entropies[mask].float())
    if not len(found):
        return torch.zeros_like(mask)
    # not torch.quantile, which takes at most 16 million values; linear interpolation between neighbours, as it does
    place = (1 - share) * (len(found) - 1)
    ordered, low = found.sort().values, math.floor(place)
    threshold = torch.lerp(ordered[low], ordered[math.ceil(place)], place - low)
    return mask & (entropies >= threshold)


def entropy_bonus(
    entropies: Tensor,
    mean_weights: Tensor,
    loss_mask: Tensor,
    policy_mask: Tensor | None = None,
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Mean entropy per token, in nats, as a sum over micro-batches and ranks: entropies with gradient and the weights
    of a mean over tokens, (B, T). With `policy_mask` over its tokens, taken to be as many in every micro-batch as
    they are in this one of all ranks; `all_reduce` sums over them."""
    mask = loss_mask.bool()
    if policy_mask is not None:
        chosen, tokens = all_reduce(torch.stack([policy_mask.sum(), mask.sum()]))
        share = chosen / tokens.clamp(min=1)
        mask, mean_weights = policy_mask, mean_weights / share.clamp(min=1e-6)
    return (torch.where(mask, entropies, 0.0) * torch.where(mask, mean_weights, 0.0)).sum()
