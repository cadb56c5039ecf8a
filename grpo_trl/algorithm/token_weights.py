"""Every averaging rule is a (B, T) weight, so the loss is `(per_token_loss * token_weights).sum()` everywhere."""

from collections.abc import Callable

import torch
from torch import Tensor

# name -> (mask (B, T), tokens and completions that count over all ranks, max_completion_length) -> weights (B, T)
TOKEN_WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "token": lambda mask, tokens, completions, longest: mask / tokens,
    "sequence": lambda mask, tokens, completions, longest: mask / mask.sum(1, keepdim=True).clamp(min=1) / completions,
    "max_length": lambda mask, tokens, completions, longest: mask / (completions * longest),
    "sequence_sum": lambda mask, tokens, completions, longest: mask / completions,
}


def token_weights(
    loss_mask: Tensor,
    token_weighting: str,
    *,
    max_completion_length: int,
    world_size: int = 1,
    all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Weights of the tokens of one optimizer step.

    Args:
        loss_mask: (B, T): this rank's rows of one whole optimizer step, all its micro-batches together.
        token_weighting: "token" - each token counts the same (DAPO, arXiv 2503.14476, equation 8);
            "sequence" - each completion counts the same (DeepSeekMath, arXiv 2402.03300, equation 3);
            "max_length" - tokens count the same and the normaliser is the constant B x `max_completion_length`
            (Dr. GRPO, arXiv 2503.20783);
            "sequence_sum" - tokens count the same and the normaliser is B: a long completion weighs more (LUSPO,
            arXiv 2602.05261; the sums over tokens of REINFORCE and RLOO).
        max_completion_length: in tokens, for "max_length".
        world_size: the number of ranks over which gradients are averaged (DDP); undone here and nowhere else.
        all_reduce: sums a tensor over ranks.

    Returns:
        (B, T) fp32; over all ranks and micro-batches the weights sum to `world_size` ("max_length": to at most that;
        "sequence_sum": to that times the mean length). Tokens outside the mask weigh 0. Tokens and completions that
        are masked are in no denominator; completions whose advantage is 0 are. With nothing to count, all weights are
        0 and so is the loss.
    """
    if token_weighting not in TOKEN_WEIGHTINGS:
        raise ValueError(f"token_weighting={token_weighting!r} is unknown; use one of {', '.join(TOKEN_WEIGHTINGS)}.")
    mask = loss_mask.double()
    lengths = mask.sum(1)
    num_tokens, num_completions = all_reduce(torch.stack([lengths.sum(), (lengths > 0).double().sum()])).clamp(min=1)
    weights = TOKEN_WEIGHTINGS[token_weighting](mask, num_tokens, num_completions, max_completion_length)
    return (weights * world_size).float()
