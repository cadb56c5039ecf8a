"""Attention over a stream of groups: each prompt once, then its completions, no padding.

`use_group_attention(model)` makes a model's attention look for a `layout` among its keyword arguments, which
transformers hands down through gradient checkpointing and adapters. Without one, attention is what it was. The
function stays in place: checkpointing runs layers again in the backward pass, and must not find another one there.

`GroupLayout` has three implementations of one function: `merged_attention` on the CPU, `varlen_attention` on CUDA in
16 bit where the kernels run, and `branchwise_attention` everywhere else.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .unread import announce
from .varlen import VarlenIndex, varlen_attention, varlen_fits

GROUP_ATTENTION = "group_sdpa"  # a name with "sdpa" in it passes transformers' checks of what a model supports

# Private, because the public functional keeps the log-sum-exp to itself. Both take fewer key than query heads.
flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Layout(Protocol):
    """Says how the tokens of a forward pass attend to each other."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float
    ) -> Tensor:
        """query (B, H, N, D), key and value (B, Hk, N, D) -> (B, N, H, D)."""
        ...


def use_group_attention(model: PreTrainedModel) -> None:
    """From now on `model(..., layout=layout, attention_mask=no_mask(device))` attends as the layout says. Other calls
    are undisturbed: they run transformers' SDPA attention."""
    model.set_attn_implementation(GROUP_ATTENTION)


def no_mask(device: torch.device) -> Tensor:
    """Keeps transformers from building a mask, which a layout does not need: one of 4 dimensions is handed down as it
    is."""
    return torch.empty(1, 1, 1, 1, device=device)


def _group_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    announce(module, getattr(layout, "unread", 0))
    if layout is None:
        plain = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # it casts what SDPA is given, but does not know these implementations
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    scaling = 1 / sqrt(query.shape[-1]) if scaling is None else scaling
    return layout.attend(module, query, key, value, scaling=scaling, dropout=dropout), None


AttentionInterface.register(GROUP_ATTENTION, _group_attention)
AttentionMaskInterface.register(GROUP_ATTENTION, AttentionMaskInterface()["sdpa"])


class GroupLayout:
    """A stream of groups: the shared parts of all prompts first, then all branches.

    A shared part attends causally to itself; a branch to the shared part of its group and causally to itself.

    Args:
        shared: length of each group's shared part, in tokens; 0 where a prompt is one token.
        branches: for each group the lengths of its branches.
        unread: of so many tokens at the beginning nobody reads the outputs.
    """

    def __init__(self, shared: Sequence[int], branches: Sequence[Sequence[int]], unread: int = 0):
        self.shared, self.unread = _spans(shared), unread
        of_groups = _spans([sum(lengths) for lengths in branches], start=sum(shared))
        self.branches = [_spans(lengths, part.start) for lengths, part in zip(branches, of_groups, strict=True)]
        # what attends causally to itself, in the order of the stream; and all branches of a group with what they share
        self.parts = [part for part in (*self.shared, *chain(*self.branches)) if _length(part)]
        pairs = zip(of_groups, self.shared, strict=True)
        self.crossings = [(part, shared) for part, shared in pairs if _length(part) and _length(shared)]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0
    ) -> Tensor:
        """(1, H, N, D) and (1, Hk, N, D) -> (1, N, H, D)."""
        if query.device.type == "cpu" and not dropout:
            out = merged_attention(query, key, value, self, scaling)
        elif not dropout and varlen_fits(query.device, query.dtype, query.shape[-1]):
            out = varlen_attention(query, key, value, self.varlen_index.to(query.device), scaling)
        else:
            out = branchwise_attention(query, key, value, self, scaling, dropout)
        return out.transpose(1, 2)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """(1, H, N, ...) -> what belongs to each of `parts`."""
        return x.split([_length(part) for part in self.parts], dim=2)

    @cached_property
    def varlen_index(self) -> VarlenIndex:
        """The same for kernels of variable length."""
        branches = [[*map(_length, lengths)] for lengths in self.branches]
        return VarlenIndex([*map(_length, self.parts)], [*map(_length, self.shared)], branches)

    @cached_property
    def seen(self) -> list[tuple[slice, slice]]:
        """Each part with the shared part that it sees besides itself, which is empty for a shared part."""
        nothing = slice(0, 0)
        seen = [(part, nothing) for part in self.shared]
        for shared, branches in zip(self.shared, self.branches, strict=True):
            seen += [(branch, shared) for branch in branches]
        return [(part, shared) for part, shared in seen if _length(part)]


def merged_attention(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scaling: float) -> Tensor:
    """On the CPU, without a copy of any key: query (1, H, N, D), key and value (1, Hk, N, D) -> (1, H, N, D).

    All branches of a group attend to their shared part in one product and each to itself in another; the two are
    merged by their log-sum-exp. Given the merged output and log-sum-exp, the backward pass of each product is the
    exact gradient of its part, as between the blocks of Ring Attention (arXiv 2310.01889).
    """
    return _MergedAttention.apply(query, key, value, layout, scaling)  # pyright: ignore[reportReturnType]


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scaling: float) -> Tensor:
        pieces = zip(*(layout.split(x) for x in (query, key, value)), strict=True)
        of_parts = [flash_cpu(*piece, is_causal=True, scale=scaling) for piece in pieces]
        out, lse = (_join(x) for x in zip(*of_parts, strict=True))
        for part, shared in layout.crossings:
            own_out, own_lse = out[:, :, part], lse[:, :, part]
            shared_out, shared_lse = flash_cpu(
                query[:, :, part], key[:, :, shared], value[:, :, shared], scale=scaling
            )
            share = torch.sigmoid(shared_lse - own_lse)  # of the softmax's mass
            own_out.lerp_(shared_out, share[..., None].to(out.dtype))
            torch.logaddexp(own_lse, shared_lse, out=own_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, layout = (grad, *ctx.saved_tensors), ctx.layout
        pieces = zip(*map(layout.split, inputs), strict=True)
        of_parts = [_flash_cpu_backward(*piece, 0.0, True, scale=ctx.scaling) for piece in pieces]
        grads = [_join(x) for x in zip(*of_parts, strict=True)]
        for part, shared in layout.crossings:
            places = (part, part, shared, shared, part, part)  # of grad, query, key, value, out, log-sum-exp
            given = (x[:, :, place] for x, place in zip(inputs, places, strict=True))
            of_crossing = _flash_cpu_backward(*given, 0.0, False, scale=ctx.scaling)
            for total, found, place in zip(grads, of_crossing, (part, shared, shared), strict=True):
                total[:, :, place] += found
        return (*grads, None, None)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """(1, H, n, ...) each -> (1, H, N, ...), which is (1, N, H, ...) in memory, as layers want it."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def branchwise_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scaling: float, dropout: float = 0.0
) -> Tensor:
    """One SDPA call for each part. query (1, H, N, D), key and value (1, Hk, N, D) -> (1, H, N, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    # split, not sliced: the gradient of a slice is as long as the stream
    pieces = zip(*(layout.split(x) for x in (query, key, value)), strict=True)
    by_start = {part.start: piece for part, piece in zip(layout.parts, pieces, strict=True)}
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    out = []
    for part, shared in layout.seen:
        q, k, v = by_start[part.start]
        if not _length(shared):
            out.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
            continue
        _, shared_k, shared_v = by_start[shared.start]
        k, v = torch.cat([shared_k, k], dim=2), torch.cat([shared_v, v], dim=2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(_length(shared))
        out.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
    return torch.cat(out, dim=2)


def _length(part: slice) -> int:
    return part.stop - part.start


def _spans(lengths: Sequence[int], start: int = 0) -> list[slice]:
    """Consecutive slices of these lengths."""
    ends = list(accumulate(lengths, initial=start))
    return [slice(a, b) for a, b in pairwise(ends)]
