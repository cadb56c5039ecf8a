"""One token per row through the model: by its own layers, or by the same arithmetic with fewer calls.

On a few tokens, a layer of transformers takes longer to get to its kernels than to run them. `Decoder` is written for
models that are built as Llama is. Whether one is, is not guessed: its first step is run both ways and compared.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import SiLUActivation
from transformers.utils import logging

from ...policy.attention import no_mask
from ...policy.head import finish_logits, to_logits
from ...policy.norms import is_rms_norm, rms_norm
from ...policy.unread import TOKENWISE
from . import kernels
from .attention import RowsLayout
from .weights import ROWS_AT_A_TIME, PackedLinear, joined, may_be_packed

logger = logging.get_logger(__name__)

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

    @contextlib.contextmanager
    def rollout(self) -> Iterator[None]:
        """Around the steps of a rollout, in which no weight changes."""
        with self.decoder.packed() if self.decoder is not None else contextlib.nullcontext():
            yield

    @property
    def by_kernels(self) -> bool:
        """Whether steps run on kernels that look up how long each row is."""
        return self.decoder is not None and self.decoder.by_kernels

    def best_rows(self, rows: int) -> int:
        """How many rows a step with so many is made of, the last of which nobody reads."""
        packed = self.decoder is not None and self.decoder.head.packed is not None
        return -(-rows // ROWS_AT_A_TIME) * ROWS_AT_A_TIME if packed and rows > ROWS_AT_A_TIME else rows

    def own_layers(self, ids: Tensor, positions: Tensor, layout: RowsLayout) -> Tensor:
        """By the model's own forward."""
        inputs = {"input_ids": ids[:, None], "position_ids": positions[:, None], "attention_mask": no_mask(ids.device)}
        hidden = self.model.base_model(**inputs, use_cache=False, layout=layout).last_hidden_state
        return to_logits(self.model, hidden[:, 0])

    def _compare(self, ids: Tensor, positions: Tensor, layout: RowsLayout) -> None:
        """Gives up the decoder unless it agrees with the layers. Whoever runs next writes the step's keys and values
        again, so that a first step leaves behind what any other does."""
        assert self.decoder is not None
        live = layout.live  # of rows that nobody reads, each way makes something else
        own, short = (run(ids, positions, layout)[live] for run in (self.own_layers, self.decoder))
        gap = float((short - own).abs().max() / own.abs().max())
        exact = self.model.dtype in TOLERANCE and not torch.is_autocast_enabled(own.device.type)
        if not gap <= (TOLERANCE[self.model.dtype] if exact else TOLERANCE_16_BIT):
            logger.warning("The layers are decoded by their own forward: the short one differs by %.2g.", gap)
            self.decoder = None
        self.compared = True


class Decoder:
    """Embedding, layers, last norm and head of a model that is built as Llama is. See `Runner`."""

    def __init__(self, model: Any):
        backbone = model.base_model
        self.model, self.head = model, _Product(model.get_output_embeddings())
        self.embed, self.rotary, self.norm = backbone.embed_tokens, backbone.rotary_emb, _norm(backbone.norm)
        self.layers = [_Layer(layer) for layer in backbone.layers]
        self.parts = [self.head, *(part for layer in self.layers for part in layer.parts)]

    @property
    def by_kernels(self) -> bool:
        """Whether attention does, at the least where what it gets is no wider than the weights."""
        return kernels.fits(self.embed.weight, self.layers[0].attention.head_dim)

    @contextlib.contextmanager
    def packed(self) -> Iterator[None]:
        """Decodes with packed copies of the weights as they are now, where that is possible. Another such context, of
        which this one is a part or which nobody ends, gets its own back."""
        possible, former = bool(self.to_pack()), [part.packed for part in self.parts]
        try:
            for part in self.parts:
                part.packed = None
                if possible:
                    part.pack()
            yield
        finally:
            for part, packed in zip(self.parts, former, strict=True):
                part.packed = packed

    def to_pack(self) -> list[Tensor]:
        """The weights that `packed` copies."""
        weights = [weight for part in self.parts for weight in part.weights()]
        return weights if may_be_packed(weights) else []

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
        self.project = _Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        self.norm_heads = _HeadNorms(attention, self.kv_heads) if hasattr(attention, "q_norm") else None
        self.out, self.mlp = _Product(attention.o_proj), _mlp(layer.mlp)
        self.parts = [self.project, *filter(None, [self.norm_heads]), self.out, *getattr(self.mlp, "parts", ())]

    def __call__(
        self, hidden: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, layout: RowsLayout
    ) -> tuple[Tensor, Tensor]:
        """hidden (n, d), and what is to be added to it; cos, sin (n, 1, D), sin with the signs of the rotation."""
        hidden, x = self.before_attention(hidden, delta)
        attend = self._attend_by_kernels if kernels.fits(x, cos.shape[-1]) else self._attend
        hidden, x = self.before_mlp(hidden, self.out(attend(x, cos, sin, layout)))
        return hidden, self.mlp(x)

    def _attend_by_kernels(self, x: Tensor, cos: Tensor, sin: Tensor, layout: RowsLayout) -> Tensor:
        index, scaling, norms = self.attention.layer_idx, self.attention.scaling, self.norm_heads
        of_heads = norms and (norms.of_query.weight, norms.of_key.weight, norms.epsilon)
        return layout.attend_projected(index, self.project.each(x), cos[:, 0], sin[:, 0], of_heads, scaling)

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, layout: RowsLayout) -> Tensor:
        size = self.attention.head_dim
        tokens = self.project(x).view(len(cos), -1, size)
        turned = tokens[:, : -self.kv_heads]  # queries and keys, H + Hk heads; values are not turned
        normed = turned if self.norm_heads is None else self.norm_heads(turned)
        # x cos + rotate_half(x) sin: rolling by half swaps the halves, `sin` brings the sign of the first
        torch.addcmul(normed * cos, normed.roll(size // 2, dims=-1), sin, out=turned)
        return layout.attend_to(self.attention.layer_idx, tokens, self.kv_heads, self.attention.scaling)


class _HeadNorms:
    """The norms of queries and keys side by side (n, H + Hk, D), as one."""

    def __init__(self, attention: Any, kv_heads: int):
        self.of_query, self.of_key = attention.q_norm, attention.k_norm
        self.epsilon = self.of_query.variance_epsilon
        self.heads, self.kv_heads = attention.q_proj.out_features // attention.head_dim, kv_heads
        self.packed: Tensor | None = None

    def weights(self) -> list[Tensor]:
        """What `pack` copies."""
        return [self.of_query.weight, self.of_key.weight]

    def pack(self) -> None:
        """From now on with the weights as they are."""
        self.packed = self._weight().detach()

    def _weight(self) -> Tensor:
        """(H + Hk, D)"""
        query, key = self.weights()
        return torch.cat([query.expand(self.heads, -1), key.expand(self.kv_heads, -1)])

    def __call__(self, tokens: Tensor) -> Tensor:
        return rms_norm(tokens, self._weight() if self.packed is None else self.packed, self.epsilon)


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    if _children(module) != TOKENWISE:
        return lambda x: module(x[:, None])[:, 0]  # experts
    return _MLP(module)


class _MLP:
    def __init__(self, module: Any):
        self.activate = module.act_fn
        self.project, self.down = _Product(module.gate_proj, module.up_proj), _Product(module.down_proj)
        self.parts = [self.project, self.down]

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.project.each(x)
        if isinstance(self.activate, nn.SiLU | SiLUActivation) and kernels.fits(gate):
            return self.down(kernels.silu_and_multiply(gate, up))
        return self.down(self.activate(gate) * up)


class _Product:
    """Linear layers that read the same input (n, d), without the calls of modules; what is no plain one (an adapter,
    quantised weights) as it is."""

    def __init__(self, *modules: Any):
        self.modules = modules
        self.plain = all(type(module) is nn.Linear for module in modules)
        self.packed: PackedLinear | None = None

    def weights(self) -> list[Tensor]:
        """What `pack` copies."""
        return [module.weight for module in self.modules] if self.plain else []

    def pack(self) -> None:
        """From now on by a copy of the weights as they are."""
        self.packed = PackedLinear(self.modules) if self.plain else None

    def __call__(self, x: Tensor) -> Tensor:
        """What they give, side by side."""
        if self.packed is not None:
            return self.packed(x)
        each = self.each(x)
        return each[0] if len(each) == 1 else torch.cat([*each], dim=-1)

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """What they give."""
        if self.packed is not None:
            return self._split(self.packed(x))
        if x.device.type == "cuda" and len(self.modules) > 1 and self.plain:  # elsewhere no copies lie side by side
            together = joined(self.weights())
            if together is not None and all(module.bias is None for module in self.modules):
                return self._split(linear(x, together))
        return [linear(x, m.weight, m.bias) if type(m) is nn.Linear else m(x) for m in self.modules]

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return x.split([module.out_features for module in self.modules], dim=-1)


def _norm(module: Any) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """A residual: hidden (n, d) and what is added to it -> the sum, and its norm. An RMS norm in few operations;
    another as it is."""

    def apply(hidden: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        if is_rms_norm(module) and kernels.fits(hidden):
            device = hidden.device.type
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
            return kernels.add_and_norm(hidden, delta, module.weight, module.variance_epsilon, dtype)
        hidden = hidden if delta is None else hidden + delta
        if is_rms_norm(module) and hidden.dtype == module.weight.dtype:
            return hidden, rms_norm(hidden, module.weight, module.variance_epsilon)
        return hidden, module(hidden)

    return apply


def _is_like_llama(backbone: Any) -> bool:
    """By the names and sizes of its parts."""
    if _children(backbone) != {"embed_tokens", "layers", "norm", "rotary_emb"} or _acts_later(backbone.config):
        return False
    turned = 2 * len(getattr(backbone.rotary_emb, "inv_freq", ()))  # of a head; some models turn a part of it only
    return all(
        _children(layer) == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
        and _is_like_llamas(layer.self_attn)
        and layer.self_attn.head_dim == turned
        for layer in backbone.layers
    )


def _acts_later(config: Any) -> bool:
    """Whether layers do what a first step does not show: cut what they project (OLMo), scale queries at positions
    behind the original length (Ministral-3)."""
    rope = getattr(config, "rope_parameters", None) or {}
    return getattr(config, "clip_qkv", None) is not None or "llama_4_scaling_beta" in rope


def _is_like_llamas(attention: Any) -> bool:
    norms = _children(attention) & {"q_norm", "k_norm"}
    if _children(attention) - norms - {"rotary_emb"} != {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return False
    query, key, value = (getattr(attention, f"{name}_proj").out_features for name in "qkv")
    size = attention.head_dim
    per_head = all(is_rms_norm(norm) and norm.weight.shape == (size,) for norm in map(attention.get_submodule, norms))
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
