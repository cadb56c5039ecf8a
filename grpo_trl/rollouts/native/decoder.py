"""One token per row through the model: by its own layers, or by the same arithmetic with fewer calls.

On a few tokens, a layer of transformers takes longer to get to its kernels than to run them. `Decoder` is written for
models that are built as Llama is. Whether one is, is not guessed: its first step is run both ways and compared.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import SiLUActivation
from transformers.utils import logging

from ...policy.attention import no_mask
from ...policy.head import finish_logits, to_logits
from . import kernels
from .attention import RowsLayout
from .weights import joined

logger = logging.get_logger(__name__)

# For so many rows the CPU's kernels are faster (up to three times) with the weight as the left factor
WEIGHT_FIRST = range(12, 65)
# Largest difference of logits, relative to the largest of them, that rounding explains
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
TOLERANCE_16_BIT = 0.1


class Runner:
    """ids (n,), positions (n,), layout -> logits (n, V) in fp32, by a causal LM.

    Its weights are read where they are, adapters included.
    """

    def __init__(self, model: Any):
        self.model = model
        self.signature = _signature(model)
        self.decoder = Decoder(model) if _is_like_llama(model.base_model) and not _bypasses_hooks(model) else None
        self.compared = False

    def fits(self, model: nn.Module) -> bool:
        """Whether this still is the runner of the model: no module replaced, no hook added."""
        return model is self.model and self.signature == _signature(model)

    def __call__(self, ids: Tensor, positions: Tensor, layout: RowsLayout) -> Tensor:
        if self.decoder is not None and not self.compared:
            self._compare(ids, positions, layout)
        return (self.decoder or self.own_layers)(ids, positions, layout)

    def own_layers(self, ids: Tensor, positions: Tensor, layout: RowsLayout) -> Tensor:
        """By the model's own forward."""
        inputs = {"input_ids": ids[:, None], "position_ids": positions[:, None], "attention_mask": no_mask(ids.device)}
        hidden = self.model.base_model(**inputs, use_cache=False, layout=layout).last_hidden_state
        return to_logits(self.model, hidden[:, 0])

    def _compare(self, ids: Tensor, positions: Tensor, layout: RowsLayout) -> None:
        """Gives up the decoder unless it agrees with the layers. Whoever runs next writes the step's keys and values
        again, so that a first step leaves behind what any other does."""
        assert self.decoder is not None
        own, short = self.own_layers(ids, positions, layout), self.decoder(ids, positions, layout)
        gap = float((short - own).abs().max() / own.abs().max())
        exact = self.model.dtype in TOLERANCE and not torch.is_autocast_enabled(own.device.type)
        if not gap <= (TOLERANCE[self.model.dtype] if exact else TOLERANCE_16_BIT):
            logger.info("The layers are decoded by their own forward: the short one differs by %.2g.", gap)
            self.decoder = None
        self.compared = True


class Decoder:
    """Embedding, layers, last norm and head of a model that is built as Llama is. See `Runner`."""

    def __init__(self, model: Any):
        backbone = model.base_model
        self.model, self.head = model, _linear(model.get_output_embeddings())
        self.embed, self.rotary, self.norm = backbone.embed_tokens, backbone.rotary_emb, _norm(backbone.norm)
        self.layers = [_Layer(layer) for layer in backbone.layers]

    @torch.inference_mode()  # a sixth less time per operation than no_grad
    def __call__(self, ids: Tensor, positions: Tensor, layout: RowsLayout) -> Tensor:
        hidden = self.embed(ids)
        cos, sin = (x[:, 0, None] for x in self.rotary(hidden[:, None], positions[:, None]))  # (n, 1, D)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        delta = None  # what is to be added to `hidden`: norms do it
        for layer in self.layers:
            hidden, delta = layer(hidden, delta, cos, sin, layout)
        return finish_logits(self.model, self.head(self.norm(hidden, delta)[1]).contiguous())


class _Layer:
    """Attention and MLP, each behind a norm and with a residual."""

    def __init__(self, layer: Any):
        attention = self.attention = layer.self_attn
        self.before_attention, self.before_mlp = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.project = _neighbours([attention.q_proj, attention.k_proj, attention.v_proj])
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        self.out, self.mlp = _linear(attention.o_proj), _mlp(layer.mlp)

    def __call__(
        self, hidden: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, layout: RowsLayout
    ) -> tuple[Tensor, Tensor]:
        """hidden (n, d), and what is to be added to it; cos, sin (n, 1, D), sin with the signs of the rotation."""
        hidden, x = self.before_attention(hidden, delta)
        projected = self.project(x)
        attend = self._attend_by_kernels if kernels.fits(x, cos.shape[-1]) else self._attend
        hidden, x = self.before_mlp(hidden, self.out(attend(projected, cos, sin, layout)))
        return hidden, self.mlp(x)

    def _attend_by_kernels(self, projected: Sequence[Tensor], cos: Tensor, sin: Tensor, layout: RowsLayout) -> Tensor:
        attention = self.attention
        norms = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon)
        return layout.attend_projected(attention.layer_idx, projected, cos[:, 0], sin[:, 0], norms, attention.scaling)

    def _attend(self, projected: Sequence[Tensor], cos: Tensor, sin: Tensor, layout: RowsLayout) -> Tensor:
        size = self.attention.head_dim
        tokens = torch.cat([*projected], dim=-1).view(len(cos), -1, size)
        turned = tokens[:, : -self.kv_heads]  # queries and keys, H + Hk heads; values are not turned
        # x cos + rotate_half(x) sin: rolling by half swaps the halves, `sin` brings the sign of the first
        normed = self._normed(turned)
        torch.addcmul(normed * cos, normed.roll(size // 2, dims=-1), sin, out=turned)
        return layout.attend_to(self.attention.layer_idx, tokens, self.kv_heads, self.attention.scaling)

    def _normed(self, tokens: Tensor) -> Tensor:
        """Queries and keys (n, H + Hk, D) behind their norms, if the model has any."""
        if not hasattr(self.attention, "q_norm"):
            return tokens
        of_query, of_key = self.attention.q_norm, self.attention.k_norm
        heads = tokens.shape[1] - self.kv_heads
        weight = torch.cat([of_query.weight.expand(heads, -1), of_key.weight.expand(self.kv_heads, -1)])
        return rms_norm(tokens, weight, of_query.variance_epsilon)


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    if _children(module) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return lambda x: module(x[:, None])[:, 0]  # experts
    project, down = _neighbours([module.gate_proj, module.up_proj]), _linear(module.down_proj)

    def apply(x: Tensor) -> Tensor:
        gate, up = project(x)
        if isinstance(module.act_fn, nn.SiLU | SiLUActivation) and kernels.fits(gate):
            return down(kernels.silu_and_multiply(gate, up))
        return down(module.act_fn(gate) * up)

    return apply


def _neighbours(modules: list[Any]) -> Callable[[Tensor], Sequence[Tensor]]:
    """Layers that read the same input (n, d); where their weights are one matrix in memory, as one product."""
    separate = [_linear(module) for module in modules]
    plain = all(type(module) is nn.Linear and module.bias is None for module in modules)

    def apply(x: Tensor) -> Sequence[Tensor]:
        # elsewhere the engine makes no copies, and the question would cost more than the answer
        together = joined([module.weight for module in modules]) if plain and x.device.type == "cuda" else None
        if together is None:
            return [layer(x) for layer in separate]
        return linear(x, together).split([module.out_features for module in modules], dim=-1)

    return apply


def _linear(module: Any) -> Callable[[Tensor], Tensor]:
    """A plain linear layer without the call of a module; anything else (an adapter, quantised weights) as it is."""
    if type(module) is not nn.Linear:
        return module

    def apply(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        if x.device.type != "cpu" or len(x) not in WEIGHT_FIRST or x.dtype != weight.dtype:
            return linear(x, weight, bias)
        return (torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())).t()

    return apply


def _norm(module: Any) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """A residual: hidden (n, d) and what is added to it -> the sum, and its norm. An RMS norm in few operations;
    another as it is."""

    def apply(hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        if _is_rms_norm(module) and kernels.fits(hidden):
            device = hidden.device.type
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
            return kernels.add_and_norm(hidden, delta, module.weight, module.variance_epsilon, dtype)
        hidden = hidden if delta is None else hidden + delta
        if _is_rms_norm(module) and hidden.dtype == module.weight.dtype:
            return hidden, rms_norm(hidden, module.weight, module.variance_epsilon)
        return hidden, module(hidden)

    return apply


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Over the last dimension. On the CPU, where torch's own is a chain of seven operations, in five."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], None, epsilon) * weight
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(x.new_full((), epsilon), norm, norm, value=1 / x.shape[-1])
    return x * mean_square.rsqrt_() * weight


def _is_rms_norm(module: Any) -> bool:
    return hasattr(module, "weight") and hasattr(module, "variance_epsilon")


def _is_like_llama(backbone: Any) -> bool:
    """By the names and sizes of its parts."""
    return _children(backbone) == {"embed_tokens", "layers", "norm", "rotary_emb"} and all(
        _children(layer) == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
        and _is_like_llamas(layer.self_attn)
        for layer in backbone.layers
    )


def _is_like_llamas(attention: Any) -> bool:
    norms = _children(attention) & {"q_norm", "k_norm"}
    if _children(attention) - norms - {"rotary_emb"} != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return False
    query, key, value = (getattr(attention, f"{name}_proj").out_features for name in "qkv")
    size = attention.head_dim
    per_head = all(_is_rms_norm(norm) and norm.weight.shape == (size,) for norm in map(attention.get_submodule, norms))
    sizes_fit = key == value and query == attention.o_proj.in_features and query % key == 0 and key % size == 0
    return sizes_fit and len(norms) in (0, 2) and per_head


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _bypasses_hooks(model: Any) -> bool:
    """Whether something waits for a module to be called that `Decoder` does not call: accelerate's hooks, which move
    tensors between devices, included. Embeddings are called, where gradient checkpointing has a hook; the whole model,
    where DeepSpeed has one, is called by neither way of decoding."""
    called = {id(module) for module in (model, model.base_model.embed_tokens, model.base_model.rotary_emb)}
    return any(count for module, count in _signature(model) if module not in called)


def _signature(model: nn.Module) -> list[tuple[int, int]]:
    """Each module, and how many hooks it has."""
    return [
        (id(m), len(m._forward_hooks) + len(m._forward_pre_hooks) + hasattr(m, "_hf_hook")) for m in model.modules()
    ]
