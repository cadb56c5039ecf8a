"""Log-probabilities of sampled completions under a causal language model.

`per_token_logps` is the seam: policy, old policy and reference all go through it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import RolloutBatch


def per_token_logps(
    model: nn.Module, batch: RolloutBatch, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each completion token given everything before it, in fp32.

    Args:
        model: a causal LM, wrapped (DDP, DeepSpeed, PEFT) or not; its train/eval mode is left alone.
        batch: B rows on the model's device.
        temperature: divides the logits, as in sampling: the policy that is trained is the one that sampled.
        with_entropy: also return the entropy of the next-token distributions (no gradient), in nats.

    Returns:
        (B, T) log-probabilities, and (B, T) entropies or None. Values outside `completion_mask` mean nothing.
    """
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
    length = batch.completion_ids.shape[1]
    # explicit: left-padded, models with absolute positions would otherwise count the pads (huggingface/trl#6800)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    # the logits at position i are of token i + 1, so the completion needs one position more, and the last is dropped
    keep = {"logits_to_keep": length + 1} if _takes_logits_to_keep(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **keep).logits
    logits = logits[:, -length - 1 : -1].float()
    if temperature != 1:  # spares a copy of the largest tensor of the step
        logits = logits / temperature
    log_normalizer = logits.logsumexp(-1)
    logps = logits.gather(-1, batch.completion_ids[..., None])[..., 0] - log_normalizer
    return logps, _entropy(logits, log_normalizer) if with_entropy else None


@torch.no_grad()
def _entropy(logits: Tensor, log_normalizer: Tensor) -> Tensor:
    """Row by row, so that only few more (T, V) tensors exist at a time."""
    rows = zip(logits, log_normalizer, strict=True)
    lowest = torch.finfo(logits.dtype).min  # for -inf: a token of probability 0 adds 0, but 0 x -inf is NaN
    return torch.stack([z - ((x - z[:, None]).exp() * x.clamp(min=lowest)).sum(-1) for x, z in rows])


def _takes_logits_to_keep(model: nn.Module) -> bool:
    inner: Any = getattr(model, "module", model)  # DDP, DeepSpeed
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
