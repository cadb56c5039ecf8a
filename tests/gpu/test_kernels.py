"""Each kernel of a decoding step against torch."""

import pytest
import torch
from torch.nn.functional import silu

from grpo_trl.policy.norms import rms_norm
from grpo_trl.rollouts.native import kernels
from grpo_trl.rollouts.native.attention import Grid, RowsLayout, Shape
from grpo_trl.rollouts.native.cache import Cache, LayerCache

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def gap(ours, expected):
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 100, 1024])
def test_add_and_norm(width, dtype, out):
    hidden, delta, weight = random(5, width, dtype=dtype), random(5, width, dtype=torch.bfloat16), random(width)
    for added in (None, delta):
        total, normed = kernels.add_and_norm(hidden, added, weight, 1e-6, out)
        expected = hidden if added is None else hidden + added
        assert total.dtype == dtype and torch.equal(total, expected)
        assert normed.dtype == out
        assert gap(normed, rms_norm(expected.float(), weight, 1e-6)) < max(TOLERANCE[dtype], TOLERANCE[out])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 3000])
def test_silu_and_multiply(width, dtype):
    """Also of the halves of one product, whose rows are apart."""
    product = random(5, 2 * width, dtype=dtype)
    for gate, up in (product.chunk(2, dim=-1), (random(5, width, dtype=dtype), random(5, width, dtype=dtype))):
        ours = kernels.silu_and_multiply(gate, up)
        assert ours.dtype == dtype
        assert gap(ours, silu(gate.float()) * up.float()) < TOLERANCE[dtype]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_turn_and_store(dtype, normed, together):
    n, heads, kv_heads, size, length = 3, 6, 2, 32, 10
    sizes = [count * size for count in (heads, kv_heads, kv_heads)]
    projected = [random(n, width, dtype=dtype) for width in sizes]
    if together:  # parts of one product, whose rows are apart
        projected = torch.cat(projected, dim=-1).split(sizes, dim=-1)
    angles = random(n, size // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    sin[:, : size // 2] *= -1
    norms = (random(size), random(size), 1e-6) if normed else None
    own, ages = torch.zeros(2, n, kv_heads, length, size, device=DEVICE, dtype=dtype), torch.tensor([0, 9, 4])
    out = kernels.turn_and_store(projected, cos, sin, norms, own, ages.to(DEVICE))

    def turned(x, count, weight):
        x = x.reshape(n, count, size).float()
        x = x if weight is None else rms_norm(x, weight, 1e-6)
        return x * cos[:, None] + x.roll(size // 2, dims=-1) * sin[:, None]

    query, key, value = projected
    assert gap(out, turned(query, heads, norms and norms[0])) < TOLERANCE[dtype]
    written = own[:, torch.arange(n), :, ages]  # (n, 2, Hk, D)
    assert gap(written[:, 0], turned(key, kv_heads, norms and norms[1])) < TOLERANCE[dtype]
    assert torch.equal(written[:, 1], value.reshape(n, kv_heads, size))
    own[:, torch.arange(n), :, ages] = 0
    assert not own.any()  # nothing else was touched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (8, 1), (14, 2)])
@pytest.mark.parametrize("size", [16, 128])
def test_attend(size, heads, kv_heads, dtype):
    """Prompts and completions of all lengths, rows in any order, free places, more memory than is used."""
    torch.manual_seed(0)
    prompt_lengths, owners = [70, 1, 130], [1, 0, 2, 2, 0, 0, 2]
    n, groups, columns, length = len(owners), 4, 5, 200
    ages = torch.tensor([0, 150, 63, 64, 65, 1, 127], device=DEVICE)
    cache = Cache(groups=groups, prompt_length=140, rows=9, length=length)
    prompts = random(2, groups, kv_heads, 140, size, dtype=dtype)
    own = random(2, 9, kv_heads, length, size, dtype=dtype)
    cache.layers[0] = LayerCache(prompts, own)
    grid = Grid(groups, columns, DEVICE)
    used = grid.assign(owners, prompt_lengths)
    tokens = random(n, heads + 2 * kv_heads, size, dtype=dtype)
    shape = Shape(n, len(prompt_lengths), used, max(prompt_lengths), length)
    expected = RowsLayout(cache, grid, shape, ages).attend_to(0, tokens, kv_heads, 0.3)  # stores keys and values
    query = tokens[:, :heads].contiguous()
    for memory_of_a_captured_step in (len(prompt_lengths), groups):
        out = kernels.attend(query, prompts, own, grid, memory_of_a_captured_step, ages, 0.3)
        assert gap(out, expected) < TOLERANCE[dtype]


def test_what_fits():
    assert kernels.fits(random(1)) and kernels.fits(random(1), 128)
    assert not kernels.fits(random(1), 8) and not kernels.fits(random(1), 96)
    assert not kernels.fits(torch.zeros(1))
    by_dtype = {dtype: random(1).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    assert kernels.fits(by_dtype[torch.bfloat16], 512) and kernels.fits(by_dtype[torch.float32], 256)
    assert not kernels.fits(by_dtype[torch.float32], 512) and not kernels.fits(by_dtype[torch.float64], 64)
