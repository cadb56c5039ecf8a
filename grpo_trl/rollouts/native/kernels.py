"""Triton kernels of a decoding step (CUDA): what torch does in some dozens of small operations per layer.

On a few rows a GPU takes longer to begin an operation than to run it. Each kernel rounds where the layers of
transformers do, or less often. Sizes of heads are powers of two from 16 on (`fits`).
"""

# pyright: reportIndexIssue=false, reportInvalidTypeForm=false
import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
if importlib.util.find_spec("triton") is not None:
    triton, tl = (importlib.import_module(name) for name in ("triton", "triton.language"))
else:  # CPU builds of torch come without it
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=Any)

# So many bytes of keys are read at a time, and of values (at most 64): with those that are already on their way, this
# fits into the shared memory of every GPU since 2020
BLOCK_BYTES = 16384
COLUMNS = 1024  # of an activation, in one program
LINES = 32  # at most, queries that share the keys of a prompt in one program


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def fits(x: Tensor, size: int = 16) -> bool:
    """Whether the kernels run where `x` is (a GPU from Ampere on), with heads of this size in its dtype (32 bit at
    most): a power of two from 16 on, of at most 1 KiB, for which blocks of 16 keys have room."""
    possible = size >= 16 and size & (size - 1) == 0 and size * x.element_size() <= 1024 and x.element_size() <= 4
    return x.device.type == "cuda" and available() and _is_recent(x.device) and possible


@cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def add_and_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """hidden (n, d) and what is added to it -> the sum, and its RMS norm times `weight` in `dtype`."""
    n, width = hidden.shape
    kept = hidden.dtype if delta is None else torch.promote_types(hidden.dtype, delta.dtype)
    total = hidden if delta is None else torch.empty(n, width, dtype=kept, device=hidden.device)
    normed = torch.empty(n, width, dtype=dtype, device=hidden.device)
    added = hidden if delta is None else delta
    _add_and_norm[(n,)](
        hidden, added, weight, total, normed, epsilon, width,
        WIDTH=triton.next_power_of_2(width), ADDED=delta is not None,
    )  # fmt: skip
    return total, normed


def turn_and_store(
    projected: Sequence[Tensor], cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor, float] | None, own: Tensor,
    ages: Tensor,
) -> Tensor:  # fmt: skip
    """Queries, keys and values (n, heads D) -> queries (n, H, D), normed where the model does that and turned by their
    position; keys, treated likewise, and values go to the rows' places `ages` in the memory (2, rows, Hk, T, D).

    `cos`, `sin` (n, D), `sin` with the signs of the rotation; `norms` are the weights for queries and keys (D,), and
    epsilon.
    """
    query, key, value = projected
    _, _, kv_heads, length, size = own.shape
    heads = query.shape[1] // size
    out = torch.empty(len(query), heads, size, dtype=own.dtype, device=own.device)
    of_query, of_key, epsilon = norms or (cos, cos, 0.0)
    _turn_and_store[(len(query), heads + 2 * kv_heads)](
        query, key, value, query.stride(0), key.stride(0), value.stride(0), cos, sin, of_query, of_key, out,
        own[0], own[1], ages, epsilon, length,
        HEADS=heads, KV_HEADS=kv_heads, SIZE=size, NORMED=norms is not None, num_warps=1,
    )  # fmt: skip
    return out


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, (n, d) each, with rows as far apart as they are."""
    n, width = gate.shape
    out = torch.empty(n, width, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    _silu_and_multiply[(n, triton.cdiv(width, COLUMNS))](
        gate, up, out, gate.stride(0), up.stride(0), width, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out


def attend(
    query: Tensor, prompts: Tensor, own: Tensor, grid: Any, groups: int, ages: Tensor, scaling: float
) -> Tensor:
    """Each row's queries (n, H, D) over its prompt and its own tokens up to the one at its age -> (n, H D).

    The keys of a prompt are read once for all rows of its group, and what they give is the beginning of each row's
    online softmax over its own keys. prompts (2, P, Hk, S, D), own (2, rows, Hk, T, D); `grid`: see `Grid`.
    """
    n, heads, size = query.shape
    kv_heads, (capacity, length) = own.shape[2], (prompts.shape[3], own.shape[3])
    columns, repeats = grid.rows.shape[1], heads // kv_heads
    block = min(64, BLOCK_BYTES // (size * own.element_size()))
    lines = min(LINES, max(16, triton.next_power_of_2(columns * repeats)))
    partial = torch.empty(n, heads, size, dtype=torch.float32, device=query.device)
    lse = torch.empty(n, heads, dtype=torch.float32, device=query.device)
    _attend_to_prompts[(groups, kv_heads, triton.cdiv(columns * repeats, lines))](
        query, prompts[0], prompts[1], partial, lse, grid.rows, grid.owners, grid.places, grid.prompt_lengths,
        scaling, n, columns, capacity,
        KV_HEADS=kv_heads, REPEATS=repeats, SIZE=size, LINES=lines, BLOCK=block,
    )  # fmt: skip
    out = torch.empty(n, heads * size, dtype=query.dtype, device=query.device)
    _attend_to_own[(n, kv_heads)](
        query, own[0], own[1], partial, lse, out, ages, scaling, length,
        KV_HEADS=kv_heads, REPEATS=repeats, SIZE=size, LINES=max(16, triton.next_power_of_2(repeats)), BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit
def _add_and_norm(hidden, delta, weight, total, normed, epsilon, width, WIDTH: tl.constexpr, ADDED: tl.constexpr):
    row = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    inside = d < width
    x = tl.load(hidden + row * width + d, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(delta + row * width + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * width + d, x.to(total.dtype.element_ty), mask=inside)
        x = x.to(total.dtype.element_ty).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / width + epsilon)
    x = x.to(total.dtype.element_ty).to(tl.float32) * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + d, x.to(total.dtype.element_ty).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _silu_and_multiply(gate, up, out, gate_stride, up_stride, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < width
    x = tl.load(gate + row * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    x = (x * tl.sigmoid(x)).to(out.dtype.element_ty).to(tl.float32)
    x *= tl.load(up + row * up_stride + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turned(head, weight, cos, sin, epsilon, SIZE: tl.constexpr, NORMED: tl.constexpr):
    """One head, and the same with its halves swapped: x cos + swapped(x) sin."""
    d = tl.arange(0, SIZE)
    swapped = (d + SIZE // 2) % SIZE
    x = tl.load(head + d).to(tl.float32)
    y = tl.load(head + swapped).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + epsilon)
        x = (x * scale).to(head.dtype.element_ty).to(tl.float32) * tl.load(weight + d).to(tl.float32)
        y = (y * scale).to(head.dtype.element_ty).to(tl.float32) * tl.load(weight + swapped).to(tl.float32)
    return x * tl.load(cos + d).to(tl.float32) + y * tl.load(sin + d).to(tl.float32)


@triton.jit
def _turn_and_store(
    query, key, value, query_stride, key_stride, value_stride, cos, sin, of_query, of_key, out,
    keys, values, ages, epsilon, length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, SIZE)
    cos += row * SIZE
    sin += row * SIZE
    if head < HEADS:
        place = row * HEADS + head
        x = _turned(query + row * query_stride + head * SIZE, of_query, cos, sin, epsilon, SIZE, NORMED)
        tl.store(out + place * SIZE + d, x.to(out.dtype.element_ty))
    elif head < HEADS + KV_HEADS:
        place = row * KV_HEADS + head - HEADS
        x = _turned(key + row * key_stride + (head - HEADS) * SIZE, of_key, cos, sin, epsilon, SIZE, NORMED)
        tl.store(keys + (place * length + tl.load(ages + row)) * SIZE + d, x.to(keys.dtype.element_ty))
    else:
        place = row * KV_HEADS + head - HEADS - KV_HEADS
        x = tl.load(value + row * value_stride + (head - HEADS - KV_HEADS) * SIZE + d).to(tl.float32)
        tl.store(values + (place * length + tl.load(ages + row)) * SIZE + d, x.to(values.dtype.element_ty))


@triton.jit
def _read(
    q, keys, values, length, scaling, most, mass, out,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax of the queries (lines, D) over `length` keys, from what they have seen before: largest score,
    mass relative to it, and unnormed output."""
    d = tl.arange(0, SIZE)
    for start in range(0, length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < length
        places = n[:, None] * SIZE + d[None, :]
        k = tl.load(keys + places, mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        kept = tl.exp(most - new)
        weights = tl.exp(scores - new[:, None])
        v = tl.load(values + places, mask=inside[:, None], other=0.0)
        out = out * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        mass = mass * kept + tl.sum(weights, axis=1)
        most = new
    return most, mass, out


@triton.jit
def _attend_to_prompts(
    query, keys, values, out, lse, rows, owners, places, lengths, scaling, live, columns, capacity,
    KV_HEADS: tl.constexpr, REPEATS: tl.constexpr, SIZE: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = tl.program_id(2) * LINES + tl.arange(0, LINES)
    column = line // REPEATS
    row = tl.load(rows + group * columns + column, mask=column < columns, other=0)
    # a free place of the grid holds row 0
    there = (column < columns) & (row < live)
    there = there & (tl.load(owners + row) == group) & (tl.load(places + row) == column)
    head = row * (KV_HEADS * REPEATS) + kv_head * REPEATS + line % REPEATS
    d = tl.arange(0, SIZE)
    q = tl.load(query + head[:, None] * SIZE + d[None, :], mask=there[:, None], other=0.0)
    most = tl.full([LINES], float("-inf"), tl.float32)
    mass = tl.zeros([LINES], tl.float32)
    total = tl.zeros([LINES, SIZE], tl.float32)
    start = (group * KV_HEADS + kv_head) * capacity * SIZE
    most, mass, total = _read(
        q, keys + start, values + start, tl.load(lengths + group), scaling, most, mass, total, SIZE, BLOCK
    )
    tl.store(out + head[:, None] * SIZE + d[None, :], total / mass[:, None], mask=there[:, None])
    tl.store(lse + head, most + tl.log(mass), mask=there)


@triton.jit
def _attend_to_own(
    query, keys, values, partial, lse, out, ages, scaling, length,
    KV_HEADS: tl.constexpr, REPEATS: tl.constexpr, SIZE: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = tl.arange(0, LINES)
    there = line < REPEATS
    d = tl.arange(0, SIZE)
    head = (row * KV_HEADS + kv_head) * REPEATS + line
    places = head[:, None] * SIZE + d[None, :]
    q = tl.load(query + places, mask=there[:, None], other=0.0)
    most = tl.load(lse + head, mask=there, other=0.0)
    mass = tl.full([LINES], 1.0, tl.float32)
    total = tl.load(partial + places, mask=there[:, None], other=0.0)
    start = (row * KV_HEADS + kv_head) * length * SIZE
    most, mass, total = _read(
        q, keys + start, values + start, tl.load(ages + row) + 1, scaling, most, mass, total, SIZE, BLOCK
    )
    tl.store(out + places, (total / mass[:, None]).to(out.dtype.element_ty), mask=there[:, None])
