"""Attention of the native engine: over prompts, and of one token per row over its prompt and its own past."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...policy.attention import GroupLayout, flash_cpu
from . import kernels
from .cache import Cache


class PromptLayout(GroupLayout):
    """A stream of prompts, whose keys and values are kept as the groups `slots` of the cache."""

    def __init__(self, cache: Cache, slots: Sequence[int], lengths: Sequence[int]):
        super().__init__(lengths, [[] for _ in lengths])
        self.cache, self.slots = cache, slots

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """See `Layout`."""
        layer = self.cache.layer(module.layer_idx, key)
        for slot, part in zip(self.slots, self.shared, strict=True):
            length = part.stop - part.start
            layer.prompts[0, slot, :, :length] = key[0, :, part]
            layer.prompts[1, slot, :, :length] = value[0, :, part]
        return super().attend(module, query, key, value, **options)


class Shape(NamedTuple):
    """Sizes of a decoding step, or bounds on them."""

    rows: int  # n
    groups: int  # P
    columns: int  # K: rows of the fullest group
    prompt_length: int  # S: tokens of the longest prompt
    length: int  # T: own tokens of the oldest row, the one that is decoded included


class Grid:
    """Which rows belong to which prompt: room for `groups` prompts with `columns` rows each, all at fixed addresses.

    The queries of a group's rows are laid out side by side, so that the keys of its prompt are read once for all.
    """

    def __init__(self, groups: int, columns: int, device: torch.device):
        self.rows = torch.zeros(groups, columns, dtype=torch.long, device=device)
        self.owners = torch.zeros(groups * columns, dtype=torch.long, device=device)  # group of each row
        self.places = torch.zeros(groups * columns, dtype=torch.long, device=device)  # column of each row
        self.prompt_lengths = torch.zeros(groups, dtype=torch.long, device=device)

    def assign(self, owners: Sequence[int], prompt_lengths: Sequence[int]) -> int:
        """Takes over the group of each row and the prompt length of each group; returns K."""
        rows: list[list[int]] = [[] for _ in prompt_lengths]
        for row, owner in enumerate(owners):
            rows[owner].append(row)
        places = {row: place for group in rows for place, row in enumerate(group)}
        # what is free holds row 0 and group 0: a step of a larger shape reads them, and nobody what it makes of them
        full = [[*group, *[0] * (self.rows.shape[1] - len(group))] for group in rows]
        for memory, values in (
            (self.rows, full),
            (self.owners, owners),
            (self.places, [places[row] for row in range(len(owners))]),
            (self.prompt_lengths, prompt_lengths),
        ):
            memory.zero_()
            memory[: len(values)] = torch.tensor(values)
        return max(map(len, rows))


class RowsLayout:
    """One token of each of the first n rows. It sees its row's prompt, the row's past and itself.

    `ages` (n,) are the rows' own tokens before this one.
    """

    def __init__(self, cache: Cache, grid: Grid, shape: Shape, ages: Tensor):
        self.cache, self.grid, self.shape, self.ages = cache, grid, shape, ages
        self.index: _Index | None = None  # made by the first layer, which knows the heads

    @property
    def live(self) -> Tensor:
        """(n,), false for those that only fill up the shape."""
        grid, n = self.grid, self.shape.rows
        return grid.rows[grid.owners[:n], grid.places[:n]] == torch.arange(n, device=self.ages.device)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0
    ) -> Tensor:
        """query (n, H, 1, D), key and value (n, Hk, 1, D) -> (n, 1, H, D). See `Layout`."""
        tokens = torch.cat([query[:, :, 0], key[:, :, 0], value[:, :, 0]], dim=1)
        out = self.attend_to(module.layer_idx, tokens, key.shape[1], scaling)
        return out.view(len(out), 1, *query.shape[1::2])

    def attend_projected(
        self,
        layer_idx: int,
        projected: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Tensor, Tensor, float] | None,
        scaling: float,
    ) -> Tensor:
        """What a layer projects, before norm and rotation (n, heads D) -> (n, H D), by kernels; see there."""
        layer, ages = self.cache.layers[layer_idx], self.ages
        query = kernels.turn_and_store(projected, cos, sin, norms, layer.own, ages)
        return kernels.attend(query, layer.prompts, layer.own, self.grid, self.shape.groups, ages, scaling)

    def attend_to(self, layer_idx: int, tokens: Tensor, kv_heads: int, scaling: float) -> Tensor:
        """Queries, keys and values side by side (n, H + 2 Hk, D) -> (n, H D)."""
        layer = self.cache.layers[layer_idx]
        tokens = tokens.to(layer.own.dtype)  # under autocast, what was turned is in fp32
        n, num_heads, size = len(tokens), tokens.shape[1] - 2 * kv_heads, tokens.shape[2]
        repeats, shape = num_heads // kv_heads, self.shape
        index = self.index = self.index or _Index(self, kv_heads, repeats)
        # each key-value head of a row is a row of its own from here on: (n Hk, queries that share its keys, D)
        query = tokens[:, :num_heads].reshape(n * kv_heads, repeats * size)
        new = tokens[:, num_heads:].reshape(-1, size)
        own = layer.own.view(-1, size).index_copy_(0, index.write, new).view(2, -1, self.cache.length, size)
        keys, values = own[:, : n * kv_heads, : shape.length].unbind()

        side_by_side = query.index_select(0, index.side_by_side).view(shape.groups, kv_heads, -1, size)
        prompt_keys, prompt_values = layer.prompts[:, : shape.groups, :, : shape.prompt_length]
        prompt_out, prompt_lse = attention_and_lse(
            side_by_side, prompt_keys, prompt_values, index.prompt_bias, scaling
        )
        prompt_out = prompt_out.reshape(-1, repeats * size).index_select(0, index.back).view(-1, repeats, size)
        prompt_lse = prompt_lse.reshape(-1, repeats).index_select(0, index.back)

        bias = index.bias.to(query.dtype)  # in 16 bit the product does not take another dtype
        scores = torch.baddbmm(bias, query.view(-1, repeats, size), keys.transpose(1, 2), alpha=scaling)
        # the prompt is one more key: its score is the log-sum-exp of its scores, its value what it gave by itself
        weights = torch.cat([prompt_lse[..., None], scores], dim=-1).softmax(-1).to(values.dtype)
        return torch.addcmul(weights[..., 1:] @ values, weights[..., :1], prompt_out).view(n, -1)


class _Index:
    """Where the heads of a step's rows are: the same for all layers."""

    def __init__(self, layout: RowsLayout, heads: int, repeats: int):
        shape, grid, ages = layout.shape, layout.grid, layout.ages
        head = torch.arange(heads, device=ages.device)
        row = torch.arange(shape.rows, device=ages.device)[:, None] * heads + head  # (n, Hk)
        # from queries to the grid, (P, Hk, K), and back
        self.side_by_side = (grid.rows[: shape.groups, None, : shape.columns] * heads + head[:, None]).flatten()
        owners, places = grid.owners[: shape.rows, None], grid.places[: shape.rows, None]
        self.back = ((owners * heads + head) * shape.columns + places).flatten()
        # where new keys and values go in the memory, (n, 2 Hk)
        keys = row * layout.cache.length + ages[:, None]
        self.write = torch.cat([keys, keys + layout.cache.rows * heads * layout.cache.length], dim=1).flatten()
        # -inf where a row has no token yet, (n Hk, r, T), and behind the end of a prompt, (P, 1, K r, S)
        bias = _bias(torch.arange(shape.length, device=ages.device) > ages[:, None])
        self.bias = bias[:, None].expand(-1, heads, -1).flatten(0, 1)[:, None].expand(-1, repeats, -1)
        behind = torch.arange(shape.prompt_length, device=ages.device) >= grid.prompt_lengths[: shape.groups, None]
        self.prompt_bias = _bias(behind)[:, None, None].expand(-1, -1, shape.columns * repeats, -1)


def attention_and_lse(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """query (P, Hk, N, D); keys, values (P, Hk, S, D); bias (P, 1, N, S) -> (P, Hk, N, D), (P, Hk, N) in fp32."""
    if query.device.type == "cpu":
        return flash_cpu(query, keys, values, attn_mask=bias.to(query.dtype), scale=scaling)
    return products_and_lse(query, keys, values, bias, scaling)


def products_and_lse(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """`attention_and_lse` on any device."""
    scores = query @ keys.transpose(-1, -2) * scaling + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse


def _bias(hidden: Tensor) -> Tensor:
    """fp32: -inf where hidden, else 0."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
