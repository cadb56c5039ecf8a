"""Log-probabilities of sampled completions under a causal language model.

`per_token_logps` is the seam: policy, old policy and reference all go through it.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from ..batch import RolloutBatch
from .head import chosen, scores_of_logits
from .packing import Stream, pack, pad

Scored = tuple[Tensor, Tensor | None]  # log-probabilities, and entropies where asked for


def per_token_logps(
    model: nn.Module,
    batch: RolloutBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> Scored:
    """Log-probability of each completion token given everything before it, in fp32.

    Args:
        model: a causal LM, wrapped (DDP, DeepSpeed, PEFT) or not; its train/eval mode is left alone. One that
            `prepare` was given is run without padding and on each prompt once, where it can be.
        batch: B rows on the model's device.
        temperature: divides the logits, as in sampling: the policy that is trained is the one that sampled.
        with_entropy: also return the entropy of the next-token distributions, in nats.
        entropy_gradient: with gradient (for an entropy bonus).

    Returns:
        (B, T) log-probabilities, and (B, T) entropies or None; 0 outside `completion_mask`.
    """
    stream = pack(batch) if is_packed(model) else pad(batch)
    options = {"with_entropy": with_entropy, "entropy_gradient": entropy_gradient}
    logps, entropies = evaluate(model, stream, temperature=temperature, **options)
    return stream.rows(logps), None if entropies is None else stream.rows(entropies)


def evaluate(model: nn.Module, stream: Stream, **options: Any) -> Scored:
    """(M,) each, in the way that `prepare` found for the model."""
    by_logits = getattr(causal_lm(model), "evaluation", "logits") == "logits"
    return (from_logits if by_logits else from_head)(model, stream, **options)


def from_head(model: nn.Module, stream: Stream, **options: Any) -> Scored:
    """(M,) each, from a model whose forward scores (`head.score_completions`)."""
    what: dict[str, Any] = {"scored": stream.scored, "labels": stream.labels}
    scores = model(**_accepted(model, stream.inputs), **what, **options)
    return scores["logps"], scores.get("entropies")


def from_logits(model: nn.Module, stream: Stream, *, temperature: float, **options: Any) -> Scored:
    """(M,) each, from the logits that any causal LM returns, of all positions."""
    logits = chosen(model(**_accepted(model, stream.inputs), use_cache=False).logits, stream.scored).float()
    return scores_of_logits(logits / temperature, stream.labels.to(logits.device), **options)


def causal_lm(model: nn.Module) -> Any:
    """The `PreTrainedModel` inside DDP, DeepSpeed, `torch.compile` and PEFT."""
    inner: Any = model
    for name in ("module", "_orig_mod"):
        inner = getattr(inner, name, inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def is_packed(model: nn.Module) -> bool:
    """Whether `prepare` made the model run on streams of groups."""
    return getattr(causal_lm(model), "evaluation", None) == "packed"


def _accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Without positions where a model has none (Mamba)."""
    names = inspect.signature(causal_lm(model).forward).parameters
    return inputs if "position_ids" in names else {k: v for k, v in inputs.items() if k != "position_ids"}
