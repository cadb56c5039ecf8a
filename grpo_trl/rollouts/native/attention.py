"""Attention of the native engine: over prompts, and of one token per row over its prompt and its own past."""

from collections.abc import Sequence
from typing import Any

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


class Grid:
    """Which rows belong to which prompt: P groups, n rows, at most K rows to a group.

    The queries of a group's rows are laid out side by side, so that the keys of its prompt are read once for all.

    Args:
        prompt_lengths: of each group, in tokens.
        owners: the group of each row.
        births: the decoding step at which each row began.
    """

    def __init__(self, prompt_lengths: Sequence[int], owners: Sequence[int], births: Sequence[int], device: Any):
        rows: list[list[int]] = [[] for _ in prompt_lengths]
        places = []
        for row, owner in enumerate(owners):
            places.append(len(rows[owner]))
            rows[owner].append(row)
        columns = max(map(len, rows))
        # (P, K); a group of fewer rows is filled up with row 0, whose result is not read there
        self.rows = torch.tensor([[*row, *[0] * (columns - len(row))] for row in rows], device=device)
        self.owners = torch.tensor(owners, device=device)  # (n,)
        self.places = torch.tensor(places, device=device)  # (n,): column of each row
        self.births = (
            None if len(set(births)) == 1 else torch.tensor(births, device=device)
        )  # (n,); None: all the same
        self.longest_prompt = max(prompt_lengths)
        lengths = torch.tensor(prompt_lengths, device=device)
        self.prompt_lengths = lengths[self.owners]  # (n,)
        behind = torch.arange(self.longest_prompt, device=device) >= lengths[:, None]
        self.prompt_bias = _bias(behind) if len(set(prompt_lengths)) > 1 else None  # (P, 1, 1, S)


class RowsLayout:
    """One token of each of the first n rows of the cache. It sees its prompt, its row's past and itself.

    Args:
        ages: the row's own tokens before this one: one number for all, or (n,).
        length: own tokens of the oldest row, this one included.
    """

    def __init__(self, cache: Cache, grid: Grid, ages: int | Tensor, length: int):
        self.cache, self.grid, self.ages, self.length = cache, grid, ages, length
        self.bias = None if isinstance(ages, int) else _bias(torch.arange(length, device=ages.device) > ages[:, None])

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0
    ) -> Tensor:
        """query (n, H, 1, D), key and value (n, Hk, 1, D) -> (n, 1, H, D). See `Layout`."""
        n, num_heads, _, size = query.shape
        layer = self.cache.layer(module.layer_idx, key)
        self._write(layer.keys, key)
        self._write(layer.values, value)
        query = query.view(n, key.shape[1], -1, size) * scaling  # (n, Hk, queries to a key head, D)
        prompt_out, prompt_lse = self._attend_to_prompts(query, layer)
        scores = query @ layer.keys[:n, :, : self.length].transpose(-1, -2)
        scores = scores.float() if self.bias is None else scores + self.bias
        # the prompt is one more key: its score is the log-sum-exp of its scores, its value what it gave by itself
        weights = torch.cat([prompt_lse[..., None], scores], dim=-1).softmax(-1).to(value.dtype)
        own_out = weights[..., 1:] @ layer.values[:n, :, : self.length]
        return torch.addcmul(own_out, weights[..., :1], prompt_out).view(n, 1, num_heads, size)

    def _write(self, memory: Tensor, new: Tensor) -> None:
        n = len(new)
        if isinstance(self.ages, int):
            memory[:n, :, self.ages] = new[:, :, 0]
        else:
            memory[torch.arange(n, device=new.device), :, self.ages] = new[:, :, 0]

    def _attend_to_prompts(self, query: Tensor, layer: LayerCache) -> tuple[Tensor, Tensor]:
        """query (n, Hk, r, D), scaled -> output (n, Hk, r, D) and log-sum-exp (n, Hk, r) over the prompt's keys."""
        groups, columns = self.grid.rows.shape
        _, heads, repeats, size = query.shape
        head = torch.arange(heads, device=query.device)
        side_by_side = query[self.grid.rows[:, None], head[:, None]].view(groups, heads, -1, size)
        keys, values = (x[:groups, :, : self.grid.longest_prompt] for x in (layer.prompt_keys, layer.prompt_values))
        out, lse = _attention_and_lse(side_by_side, keys, values, self.grid.prompt_bias)
        of_rows = (self.grid.owners[:, None], head, self.grid.places[:, None])
        out, lse = out.reshape(groups, heads, columns, repeats, size), lse.reshape(groups, heads, columns, repeats)
        return out[of_rows], lse[of_rows]


def _attention_and_lse(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """query (P, Hk, N, D), scaled; keys, values (P, Hk, S, D); bias (P, 1, 1, S) -> (P, Hk, N, D), (P, Hk, N)."""
    if query.device.type == "cpu":
        mask = None if bias is None else bias.to(query.dtype).expand(-1, -1, query.shape[2], -1)
        return flash_cpu(query, keys, values, attn_mask=mask, scale=1.0)
    scores = (query @ keys.transpose(-1, -2)).float()
    scores = scores if bias is None else scores + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse


def _bias(hidden: Tensor) -> Tensor:
    """(B, N) -> (B, 1, 1, N): -inf where hidden."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)[:, None, None]
