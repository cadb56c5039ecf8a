"""One token per row through the model: by its own layers, or by the same arithmetic with fewer calls.

On a few tokens, a layer of transformers takes longer to get to its kernels than to run them. `Decoder` is written for
models that are built as Llama is. Whether one is, is not guessed: its first step is run both ways and compared.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers.utils import logging

from ...policy.attention import Layout, no_mask

logger = logging.get_logger(__name__)

# For so many rows the CPU's kernels are faster (up to four times) with the weight as the left factor
WEIGHT_FIRST = range(2, 65)
# Largest difference of hidden states, relative to the largest of them, that rounding explains
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_16_BIT = 0.1


class Runner:
    """ids (n,), positions (n,), layout -> hidden states (n, d) as the head takes them.

    `model` is a backbone. Its weights are read where they are, adapters included.
    """

    def __init__(self, model: Any):
        self.model = model
        self.signature = _signature(model)
        self.decoder = Decoder(model) if _is_like_llama(model) else None
        self.compared = False

    def fits(self, model: nn.Module) -> bool:
        """Whether this still is the runner of the model: no module replaced, no hook added."""
        return model is self.model and self.signature == _signature(model)

    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        if self.decoder is not None and not self.compared:
            self._compare(ids, positions, layout)
        return (self.decoder or self.own_layers)(ids, positions, layout)

    def own_layers(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """By the model's own forward."""
        inputs = {"input_ids": ids[:, None], "position_ids": positions[:, None], "attention_mask": no_mask(ids.device)}
        return self.model(**inputs, use_cache=False, layout=layout).last_hidden_state[:, 0]

    def _compare(self, ids: Tensor, positions: Tensor, layout: Layout) -> None:
        """Gives up the decoder unless it agrees with the layers. Whoever runs next writes the step's keys and values
        again, so that a first step leaves behind what any other does."""
        assert self.decoder is not None
        own, short = self.own_layers(ids, positions, layout), self.decoder(ids, positions, layout)
        gap = float((short - own).abs().max() / own.abs().max())
        exact = own.dtype in TOLERANCE and not torch.is_autocast_enabled(own.device.type)
        if not gap <= (TOLERANCE[own.dtype] if exact else TOLERANCE_16_BIT):
            logger.info("The layers are decoded by their own forward: the short one differs by %.2g.", gap)
            self.decoder = None
        self.compared = True


class Decoder:
    """Embedding, layers and last norm of a model that is built as Llama is."""

    def __init__(self, model: Any):
        self.embed, self.rotary, self.norm = model.embed_tokens, model.rotary_emb, _norm(model.norm)
        self.layers = [_Layer(layer) for layer in model.layers]

    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """See `Runner`."""
        hidden = self.embed(ids)
        cos, sin = (x[:, 0, None] for x in self.rotary(hidden[:, None], positions[:, None]))  # (n, 1, D)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, layout)
        return self.norm(hidden)


class _Layer:
    """Attention and MLP, each behind a norm and with a residual."""

    def __init__(self, layer: Any):
        self.attention = layer.self_attn
        self.before_attention, self.before_mlp = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.query, self.key, self.value, self.out = (_linear(getattr(self.attention, f"{x}_proj")) for x in "qkvo")
        self.query_norm, self.key_norm = (_norm(getattr(self.attention, f"{x}_norm", None)) for x in "qk")
        self.mlp = _mlp(layer.mlp)

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """hidden (n, d); cos, sin (n, 1, D), sin with the signs of the rotation."""
        shape = (len(hidden), -1, self.attention.head_dim)
        x = self.before_attention(hidden)
        query = _rotate(self.query_norm(self.query(x).view(shape)), cos, sin)
        key = _rotate(self.key_norm(self.key(x).view(shape)), cos, sin)
        tokens = (y[:, :, None] for y in (query, key, self.value(x).view(shape)))
        out = layout.attend(self.attention, *tokens, scaling=self.attention.scaling, dropout=0.0)
        hidden = hidden + self.out(out.flatten(1))
        return hidden + self.mlp(self.before_mlp(hidden))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(n, H, D): x cos + rotate_half(x) sin; rolling by half swaps the halves, `sin` brings the sign of the first."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    if _children(module) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return lambda x: module(x[:, None])[:, 0]  # experts
    gate, up, down = (_linear(getattr(module, name)) for name in ("gate_proj", "up_proj", "down_proj"))
    return lambda x: down(module.act_fn(gate(x)) * up(x))


def _linear(module: Any) -> Callable[[Tensor], Tensor]:
    """A plain linear layer without the call of a module; anything else (an adapter, quantised weights) as it is."""
    if type(module) is not nn.Linear:
        return module

    def apply(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if x.device.type != "cpu" or len(x) not in WEIGHT_FIRST or x.dtype != weight.dtype:
            return linear(x, weight, bias)
        out = torch.mm(weight, x.t()).t().contiguous()
        return out if bias is None else out.add_(bias)

    return apply


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """An RMS norm as one operation; another norm as it is; None: no norm."""
    if module is None:
        return lambda x: x
    if not hasattr(module, "weight") or not hasattr(module, "variance_epsilon"):
        return module

    def apply(x: Tensor) -> Tensor:
        weight = module.weight
        return rms_norm(x, weight.shape, weight, module.variance_epsilon) if x.dtype == weight.dtype else module(x)

    return apply


def _is_like_llama(model: Any) -> bool:
    """By the names of its parts, and only where no hook waits to be called with them."""
    optional = {"q_norm", "k_norm", "rotary_emb"}
    return (
        _children(model) == {"embed_tokens", "layers", "norm", "rotary_emb"}
        and all(
            _children(layer) == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
            and _children(layer.self_attn) - optional == {"q_proj", "k_proj", "v_proj", "o_proj"}
            for layer in model.layers
        )
        and not any(hooks for _, hooks in _signature(model))
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _signature(model: nn.Module) -> list[tuple[int, int]]:
    """Each module and how many hooks it has (accelerate's, which move tensors between devices, included)."""
    return [
        (id(m), len(m._forward_hooks) + len(m._forward_pre_hooks) + hasattr(m, "_hf_hook")) for m in model.modules()
    ]
