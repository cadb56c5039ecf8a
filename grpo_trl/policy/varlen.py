"""Attention kernels of variable length (CUDA, 16 bit): one call for the whole stream."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class VarlenIndex:
    """Which keys each part of a stream sees, as kernels of variable length take it.

    Args:
        parts: slices of the stream, in its order and none of them empty, each with what it sees besides itself.
    """

    def __init__(self, parts: Sequence[tuple[slice, slice]]):
        query_lengths = [part.stop - part.start for part, _ in parts]
        key_lengths = [seen.stop - seen.start + part.stop - part.start for part, seen in parts]
        self.max_query, self.max_key = max(query_lengths), max(key_lengths)
        # int32 offsets (parts + 1,) into the queries and the gathered keys, and the places of the gathered keys
        self.query_offsets = torch.tensor(list(accumulate(query_lengths, initial=0)), dtype=torch.int32)
        self.key_offsets = torch.tensor(list(accumulate(key_lengths, initial=0)), dtype=torch.int32)
        self.keys = torch.cat([torch.arange(s.start, s.stop) for part, seen in parts for s in (seen, part)])

    def to(self, device: torch.device) -> "VarlenIndex":
        """Moves the tensors, in place."""
        for name in ("query_offsets", "key_offsets", "keys"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        return self


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scaling: float) -> Tensor:
    """query (1, H, N, D), key and value (1, Hk, N, D) -> (1, H, N, D).

    The keys of each branch are its shared part's and its own, one after the other. A kernel that aligns its causal
    mask at the end of queries and keys (FlashAttention 2.1 and later) then masks exactly what lies ahead.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    key, value = (x.index_select(0, index.keys) for x in (key, value))
    out = kernel()(query, key, value, index.query_offsets, index.key_offsets, index.max_query, index.max_key, scaling)
    return out.transpose(0, 1)[None]


@cache
def kernel() -> Callable[..., Tensor]:
    """flash-attn where it is installed, else torch's own."""
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return lambda *args: flash_attn_varlen_func(*args[:-1], softmax_scale=args[-1], causal=True)
    return torch_kernel(inspect.signature(varlen_attn).parameters)


def torch_kernel(accepted: Any, call: Callable[..., Any] = varlen_attn) -> Callable[..., Tensor]:
    """`varlen_attn` as its torch version takes it: 2.10 has `is_causal`, 2.11 `window_size` and `scale`, later ones
    `enable_gqa`; what is missing is done here."""
    causal = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}

    def call_kernel(query, key, value, query_offsets, key_offsets, max_query, max_key, scaling) -> Any:
        options = dict(causal)
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in accepted:
                options["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        if "scale" in accepted:
            options["scale"] = scaling
        else:
            query = query * (scaling * query.shape[-1] ** 0.5)
        return call(query, key, value, query_offsets, key_offsets, max_query, max_key, **options)

    return call_kernel
