"""Attention kernels of variable length (CUDA from Ampere on, 16 bit): two calls for the whole stream, which keep no
copy of a key."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What `torch.nn.attention.varlen.varlen_attn` calls. Private, because the gradient that the public function defines
# is that of a softmax over its own keys and nothing else. Both take fewer key than query heads.
_flash = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward


@lru_cache
def varlen_fits(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernels run there, for heads of this size: in 16 bit, and from Ampere on."""
    possible = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256
    return possible and torch.cuda.get_device_capability(device) >= (8, 0)


class Sequences(NamedTuple):
    """Pairs of queries and keys that follow each other in memory: int32 offsets (pairs + 1,), and the longest."""

    queries: Tensor
    keys: Tensor
    max_query: int
    max_key: int

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int]) -> "Sequences":
        """From the lengths of each pair."""

        def offsets(lengths: Sequence[int]) -> Tensor:
            return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)

        return cls(offsets(queries), offsets(keys), max(queries), max(keys))

    def to(self, device: torch.device) -> "Sequences":
        """A copy there."""
        queries, keys = (offsets.to(device, non_blocking=True) for offsets in (self.queries, self.keys))
        return self._replace(queries=queries, keys=keys)


class VarlenIndex:
    """What attends to what in a stream, as kernels of variable length take it.

    Args:
        parts: lengths of all that attends causally to itself, in the order of the stream and none of them 0.
        shared: length of each group's shared part; they are the first tokens of the stream, in this order.
        branches: of each group the lengths of its branches; they are what comes next.
    """

    def __init__(self, parts: Sequence[int], shared: Sequence[int], branches: Sequence[Sequence[int]]):
        self.num_shared = sum(shared)
        self.all_share = all(shared)
        self.causal = Sequences.of(parts, parts)
        self.crossing: Sequences | None = None
        if any(length and sum(lengths) for length, lengths in zip(shared, branches, strict=True)):
            self.crossing = Sequences.of([sum(lengths) for lengths in branches], shared)
            self.repeated = Repeated(shared, branches)

    def to(self, device: torch.device) -> "VarlenIndex":
        """Moves the tensors, in place."""
        if self.causal.queries.device != device:
            self.causal = self.causal.to(device)
            if self.crossing is not None:
                self.crossing = self.crossing.to(device)
                self.repeated.sequences = self.repeated.sequences.to(device)
                self.repeated.places = self.repeated.places.to(device, non_blocking=True)
        return self


class Repeated:
    """Shared parts once for each branch that is not empty. See `VarlenIndex` for the arguments.

    The backward pass runs a block of keys at a time: a few hundred keys of a few prompts leave most of a GPU idle.
    """

    def __init__(self, shared: Sequence[int], branches: Sequence[Sequence[int]]):
        starts = list(accumulate(shared, initial=0))
        counts = [sum(length > 0 for length in lengths) for lengths in branches]
        self.sequences = Sequences.of(
            [length for lengths in branches for length in lengths if length],
            [length for length, count in zip(shared, counts, strict=True) for _ in range(count)],
        )
        parts = [torch.arange(*ends) for ends in pairwise(starts)]
        self.places = torch.cat([part.repeat(count) for part, count in zip(parts, counts, strict=True)])
        self.groups = list(zip(shared, counts, strict=True))

    def sum(self, gradient: Tensor) -> Tensor:
        """(len(places), Hk, D) -> (shared tokens, Hk, D)."""
        parts = gradient.split([length * count for length, count in self.groups])
        return torch.cat(
            [
                part.view(count, length, *part.shape[1:]).sum(0)
                for part, (length, count) in zip(parts, self.groups, strict=True)
            ]
        )


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scaling: float) -> Tensor:
    """query (1, H, N, D), key and value (1, Hk, N, D) -> (1, H, N, D).

    As `merged_attention`: each part to itself, all branches of a group to what they share, merged by log-sum-exp.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    out: Any = _VarlenAttention.apply(query, key, value, index, scaling)
    return out.transpose(0, 1)[None]


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scaling: float) -> Tensor:
        n = index.num_shared
        out, lse = attend(query, key, value, index.causal, scaling, causal=True)
        if index.crossing is not None:
            shared_out, shared_lse = attend(query[n:], key[:n], value[:n], index.crossing, scaling, causal=False)
            if not index.all_share:  # where there is no key, the kernel writes 0, and that the sum is infinite
                shared_lse.masked_fill_(shared_lse == torch.inf, -torch.inf)
            own_out, own_lse = out[n:], lse[:, n:]
            share = torch.sigmoid(shared_lse - own_lse)  # of the softmax's mass
            own_out.lerp_(shared_out, share.t()[..., None].to(out.dtype))
            torch.logaddexp(own_lse, shared_lse, out=own_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.index, ctx.scaling = index, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, lse = ctx.saved_tensors
        index, n = ctx.index, ctx.index.num_shared
        grads = gradients(grad, query, key, value, out, lse, index.causal, ctx.scaling, causal=True)
        if index.crossing is not None:
            repeated = index.repeated
            keys, values = (x.index_select(0, repeated.places) for x in (key, value))
            grad, query, out = (x[n:] for x in (grad, query, out))
            of_query, of_keys, of_values = gradients(
                grad, query, keys, values, out, lse[:, n:], repeated.sequences, ctx.scaling, causal=False
            )
            grads[0][n:] += of_query
            grads[1][:n] += repeated.sum(of_keys)
            grads[2][:n] += repeated.sum(of_values)
        return (*grads, None, None)


def attend(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """query (N, H, D), key and value (M, Hk, D) -> (N, H, D), and the log-sum-exp (H, N) in fp32."""
    out, lse, *_ = _flash(query, key, value, *sequences, 0.0, causal, False, scale=scaling)
    return out, lse


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, sequences: Sequences,
    scaling: float, *, causal: bool,
) -> Sequence[Tensor]:  # fmt: skip
    """Of query, key and value, given all that the queries made, with other keys too: `out` and `lse`."""
    random_state = torch.empty(2, dtype=torch.uint64, device=grad.device)  # of dropout, which there is none of
    unused = torch.empty(0, device=grad.device)
    return _flash_backward(
        grad, query, key, value, out, lse.contiguous(), *sequences, 0.0, causal, random_state, unused, scale=scaling
    )
