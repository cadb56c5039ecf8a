"""Log-probabilities of sampled completions under a language model.

`per_token_logps` is the seam: policy, old policy and reference all go through it.
"""

import inspect
from typing import Any

from torch import Tensor, nn

from ..batch import RolloutBatch
from .head import chosen, scores_of_logits
from .packing import Stream, encode, pack, pad

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
        model: a causal LM or an encoder-decoder, wrapped (DDP, DeepSpeed, PEFT) or not; its train/eval mode is left
            alone. One that `prepare` was given is run without padding and on each prompt once, where it can be.
        batch: B rows on the model's device.
        temperature: divides the logits, as in sampling: the policy that is trained is the one that sampled.
        with_entropy: also return the entropy of the next-token distributions, in nats.
        entropy_gradient: with gradient (for an entropy bonus).

    Returns:
        (B, T) log-probabilities, and (B, T) entropies or None; 0 outside `completion_mask`.
    """
    stream = _stream(model, batch)
    options = {"with_entropy": with_entropy, "entropy_gradient": entropy_gradient}
    logps, entropies = evaluate(model, stream, temperature=temperature, **options)
    return stream.rows(logps), None if entropies is None else stream.rows(entropies)


def _stream(model: nn.Module, batch: RolloutBatch) -> Stream:
    if is_encoder_decoder(model):
        return encode(batch, decoder_start(model))
    return pack(batch) if is_packed(model) else pad(batch)


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
    """(M,) each, from the logits that any language model returns, of all positions."""
    logits = chosen(model(**_accepted(model, stream.inputs), use_cache=False).logits, stream.scored).float()
    return scores_of_logits(logits / temperature, stream.labels.to(logits.device), **options)


def causal_lm(model: nn.Module) -> Any:
    """The `PreTrainedModel` inside DDP, DeepSpeed, `torch.compile` and PEFT."""
    inner: Any = model
    for name in ("module", "_orig_mod"):
        inner = getattr(inner, name, inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the prompt is read by an encoder, and the completion begins with a token of its own."""
    config = getattr(causal_lm(model), "config", None)
    return getattr(config, "is_encoder_decoder", False)


def decoder_start(model: nn.Module) -> list[int]:
    """The tokens before an encoder-decoder's completions: its start, and a first one (a language's) that its
    generation config forces. Raises ValueError for a model that names no start."""
    lm = causal_lm(model)
    declared = (getattr(owner, "decoder_start_token_id", None) for owner in (lm.generation_config, lm.config))
    start = next((token for token in declared if token is not None), None)
    if start is None:
        raise ValueError(
            f"{type(lm).__name__} has no decoder_start_token_id; set model.generation_config.decoder_start_token_id "
            "to the token that its decoder begins with (T5: the pad token)."
        )
    forced = getattr(lm.generation_config, "forced_bos_token_id", None)
    return [start] if forced is None else [start, forced]


def is_packed(model: nn.Module) -> bool:
    """Whether `prepare` made the model run on streams of groups."""
    return getattr(causal_lm(model), "evaluation", None) == "packed"


def _accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Without positions where a model has none (Mamba)."""
    names = inspect.signature(causal_lm(model).forward).parameters
    return inputs if "position_ids" in names else {k: v for k, v in inputs.items() if k != "position_ids"}
