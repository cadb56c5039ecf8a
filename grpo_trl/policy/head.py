"""From hidden states to log-probabilities, without the logits of all positions at once.

`score_completions(model)` gives a causal LM a second way to be called: with `scored` positions and their `labels` its
forward returns log-probabilities instead of logits. It stays one call of the (wrapped) model, so that DDP, DeepSpeed
and FSDP see what they need to see.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

# TRL exports the function that patches a model with it, which scores every position where there is no Triton
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

# How many logits exist at a time: those of so many scored positions, or more while they are so few
CHUNK, CHUNK_LOGITS = 512, 2**23
CACHED_LOGITS, FEWEST_ROWS = 2**17, 16  # that a core's own cache holds; but not row by row
VOCABULARY_CHUNK = 32768  # of TRL's function, as TRL calls it


@dataclass
class Scores(ModelOutput):
    """Of the M scored positions, in fp32: log-probabilities of their labels (M,); entropies (M,), if asked for."""

    logps: Tensor | None = None
    entropies: Tensor | None = None


def score_completions(model: PreTrainedModel) -> None:
    """From now on `model(..., scored=places, labels=labels)`, with the options of `score`, returns `Scores`.

    The M places are in the flattened (rows x columns) of the input: a tensor (M,) or a slice. Other calls are
    undisturbed.
    """
    if "_forward_to_logits" in vars(model):
        return
    # on the model, not in a closure: a deep copy calls its own
    model._forward_to_logits = model.forward  # pyright: ignore[reportArgumentType]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "scored" not in kwargs:
            return self._forward_to_logits(*args, **kwargs)
        scored, labels = kwargs.pop("scored"), kwargs.pop("labels")
        options = {name: kwargs.pop(name) for name in ("temperature", "with_entropy", "entropy_gradient")}
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        return Scores(*score(self, chosen(hidden, scored), labels, **options))

    # `generate` checks its arguments against the signature
    forward.__signature__ = inspect.signature(type(model).forward)  # pyright: ignore[reportFunctionMemberAccess]
    model.forward = MethodType(forward, model)


def chosen(values: Tensor, scored: Tensor | slice) -> Tensor:
    """(rows, columns, ...) -> (M, ...), also on another device than that of the ids, where a model is split."""
    return values.flatten(0, 1)[scored if isinstance(scored, slice) else scored.to(values.device)]


def score(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Hidden states (M, d) as the head takes them and the M labels -> log-probabilities (M,) and, if asked for,
    entropies (M,), with gradient or without; in fp32."""
    options = {"with_entropy": with_entropy, "entropy_gradient": entropy_gradient}
    head: Any = model.get_output_embeddings()
    if not head.weight.is_meta:  # accelerate has put it aside, and brings it to where the hidden states are
        hidden = hidden.to(head.weight.device)
    if hidden.device.type == "cuda" and _is_plain(head):
        with torch.cuda.device(hidden.device):  # kernels of Triton are launched on the current one, the policy's
            return fused_scores(model, hidden, labels.to(hidden.device), temperature=temperature, **options)

    def score_chunk(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = to_logits(model, hidden)
        logits = logits if temperature == 1 else logits / temperature
        return scores_of_logits(logits, labels.to(logits.device), **options)

    size = max(CHUNK, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    count = _as_on_all_ranks(max(1, -(-len(labels) // size)), model)
    *chunks, last = zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
    scores = [checkpoint(score_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    # the backward pass begins with the last chunk, and would have its logits made again at once
    logps, entropies = zip(*scores, score_chunk(*last), strict=True)  # pyright: ignore[reportArgumentType]
    return torch.cat(logps), torch.cat(entropies) if with_entropy else None


def _as_on_all_ranks(count: int, model: PreTrainedModel) -> int:
    """How often every rank calls the head: where ZeRO-3 or FSDP shards a model, a call or its gradient is a
    collective."""
    weight = cast(nn.Linear, model.get_output_embeddings()).weight
    if not (hasattr(weight, "ds_id") or any(isinstance(module, FSDPModule) for module in model.modules())):
        return count
    most = torch.tensor(count, device=weight.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def fused_scores(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`score` by TRL's kernels, for a head that is a weight and nothing else. They sum up the weight's gradient in
    fp32 whatever its dtype."""
    head: Any = model.get_output_embeddings()
    scale, softcap = logit_scale_and_softcap(model)
    chunk = min(VOCABULARY_CHUNK, len(head.weight))  # of memory that is taken whatever the vocabulary
    options = (temperature, chunk, softcap, scale, ("entropy",) if with_entropy else ())
    logps, entropies, *_ = ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, labels, *options)
    if not with_entropy:
        return logps, None
    return logps, entropies if entropy_gradient else entropies.detach()


def to_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states (..., d) as the head takes them -> the model's logits (..., V) in fp32."""
    head: Any = model.get_output_embeddings()
    return finish_logits(model, head(hidden))


def finish_logits(model: PreTrainedModel, product: Tensor) -> Tensor:
    """What the head's weight gives (..., V) -> the model's logits in fp32."""
    scale, softcap = logit_scale_and_softcap(model)
    logits = product.float()
    logits = logits if scale == 1 else logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def scores_of_logits(
    logits: Tensor, labels: Tensor, *, with_entropy: bool, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(M, V) fp32 and (M,) -> log-probabilities (M,) and, if asked for, entropies (M,), with gradient or without."""
    return _Scores.apply(logits, labels, with_entropy, entropy_gradient)  # pyright: ignore[reportReturnType]


class _Scores(torch.autograd.Function):
    """With what autograd would make of (M, V) numbers, each in memory of its own, made in place."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, with_entropy: bool, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        log_normalizer, entropies = _normalize(logits, with_entropy=with_entropy)
        logps = logits.gather(-1, labels[:, None])[:, 0] - log_normalizer
        ctx.save_for_backward(logits, labels, log_normalizer, entropies if entropy_gradient else None)
        if entropies is not None and not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels, log_normalizer, entropies = ctx.saved_tensors
        grad = logits - log_normalizer[:, None]
        if entropies is None:
            grad.exp_().mul_(-grad_logps[:, None])
        else:  # the entropy H changes with the logit of a token of probability p by -p (log p + H)
            probs = grad.exp()
            _finite_(grad).mul_(probs).addcmul_(probs, entropies[:, None])
            grad.mul_(-grad_entropies[:, None]).addcmul_(probs, grad_logps[:, None], value=-1)
        return grad.scatter_add_(-1, labels[:, None], grad_logps[:, None]), None, None, None


def _normalize(logits: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(M, V) -> log-sum-exp (M,) and, if asked for, entropies (M,) with one exponential for both; on the CPU in parts
    that stay in its cache."""
    rows = max(FEWEST_ROWS, CACHED_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    log_normalizer, entropies = [], []
    for part in logits.split(rows):
        largest = part.amax(-1, keepdim=True)
        shifted = part - largest
        weights = shifted.exp()
        total = weights.sum(-1)
        log_total = total.log()
        log_normalizer.append(log_total + largest[:, 0])
        if with_entropy:
            entropies.append(log_total - weights.mul_(_finite_(shifted)).sum(-1) / total)  # no product of autocast
    return torch.cat(log_normalizer), torch.cat(entropies) if with_entropy else None


def _finite_(logps: Tensor) -> Tensor:
    """In place: a token of probability 0 adds 0 to a mean, but 0 x -inf is NaN."""
    return logps.clamp_(min=torch.finfo(logps.dtype).min)


# What models multiply the product of their head with: config field -> factor. `policy.support` finds out whether a
# model does something else.
LOGIT_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": float,  # Cohere
    "lm_head_multiplier": float,  # Falcon-H1
    "logits_scaling": lambda value: 1 / value,  # Granite
}


def logit_scale_and_softcap(model: PreTrainedModel) -> tuple[float, float | None]:
    """The logits are softcap(scale x) of the head's product x, where softcap(x) = cap tanh(x / cap)."""
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in LOGIT_SCALES}
    scales = [LOGIT_SCALES[name](value) for name, value in values.items() if value is not None]
    return (scales[0] if scales else 1.0), getattr(config, "final_logit_softcapping", None)


def _is_plain(head: nn.Module) -> bool:
    """Whether the weight is all there is: no adapter, not quantised, not sharded (DTensor, ZeRO-3), not put aside."""
    weight = head.weight
    plain = type(weight) is nn.Parameter and not weight.is_meta and not hasattr(weight, "ds_id")
    return type(head) is nn.Linear and plain
