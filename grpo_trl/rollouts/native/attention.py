"""Attention of the native engine: over prompts, and of one token per row over its prompt and its own past."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...policy.attention import GroupLayout, flash_cpu
from .cache import Cache, LayerCache


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
            layer.prompt_keys[slot, :, :length] = key[0, :, part]
            layer.prompt_values[slot, :, :length] = value[0, :, part]
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
        self.cache, self.shape, self.ages = cache, shape, ages
        self.rows = torch.arange(shape.rows, device=ages.device)
        self.side_by_side = grid.rows[: shape.groups, None, : shape.columns]
        self.owners, self.places = grid.owners[: shape.rows, None], grid.places[: shape.rows, None]
        # (n, 1, 1, T) and (P, 1, 1, S): -inf where a row has no token yet, and behind the end of a prompt
        self.bias = _bias(torch.arange(shape.length, device=ages.device) > ages[:, None])
        positions = torch.arange(shape.prompt_length, device=ages.device)
        self.prompt_bias = _bias(positions >= grid.prompt_lengths[: shape.groups, None])

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0
    ) -> Tensor:
        """query (n, H, 1, D), key and value (n, Hk, 1, D) -> (n, 1, H, D). See `Layout`."""
        n, num_heads, _, size = query.shape
        layer = self.cache.layer(module.layer_idx, key)
        layer.keys[self.rows, :, self.ages] = key[:, :, 0]
        layer.values[self.rows, :, self.ages] = value[:, :, 0]
        query = query.view(n, key.shape[1], -1, size) * scaling  # (n, Hk, queries to a key head, D)
        prompt_out, prompt_lse = self._attend_to_prompts(query, layer)
        scores = query @ layer.keys[:n, :, : self.shape.length].transpose(-1, -2) + self.bias
        # the prompt is one more key: its score is the log-sum-exp of its scores, its value what it gave by itself
        weights = torch.cat([prompt_lse[..., None], scores], dim=-1).softmax(-1).to(value.dtype)
        own_out = weights[..., 1:] @ layer.values[:n, :, : self.shape.length]
        return torch.addcmul(own_out, weights[..., :1], prompt_out).view(n, 1, num_heads, size)

    def _attend_to_prompts(self, query: Tensor, layer: LayerCache) -> tuple[Tensor, Tensor]:
        """query (n, Hk, r, D), scaled -> output (n, Hk, r, D) and log-sum-exp (n, Hk, r) over the prompt's keys."""
        _, groups, columns, length, _ = self.shape
        _, heads, repeats, size = query.shape
        head = torch.arange(heads, device=query.device)
        side_by_side = query[self.side_by_side, head[:, None]].view(groups, heads, columns * repeats, size)
        keys, values = (x[:groups, :, :length] for x in (layer.prompt_keys, layer.prompt_values))
        out, lse = attention_and_lse(side_by_side, keys, values, self.prompt_bias)
        of_rows = (self.owners, head, self.places)
        out, lse = out.reshape(groups, heads, columns, repeats, size), lse.reshape(groups, heads, columns, repeats)
        return out[of_rows], lse[of_rows]


def attention_and_lse(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """query (P, Hk, N, D), scaled; keys, values (P, Hk, S, D); bias (P, 1, 1, S) -> (P, Hk, N, D), (P, Hk, N) fp32."""
    if query.device.type == "cpu":
        mask = bias.to(query.dtype).expand(-1, -1, query.shape[2], -1)
        return flash_cpu(query, keys, values, attn_mask=mask, scale=1.0)
    return products_and_lse(query, keys, values, bias)


def products_and_lse(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_and_lse` on any device."""
    scores = query @ keys.transpose(-1, -2) + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse


def _bias(hidden: Tensor) -> Tensor:
    """(B, N) -> (B, 1, 1, N) fp32: -inf where hidden."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None, None]
