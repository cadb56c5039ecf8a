"""Memory of a rollout, allocated once: keys and values of each prompt once and of each row's own tokens, and the state
of the rows.

Nothing is padded on the left and nothing is concatenated. Live groups and rows are the first ones: whoever leaves is
replaced by the last. Addresses never change, so that decoding steps can be captured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """Of one layer, with Hk key-value heads of size D."""

    prompts: Tensor  # (2, groups, Hk, S, D): keys, values
    own: Tensor  # (2, rows, Hk, T, D)


class Cache:
    """Keys and values of `groups` prompts of `prompt_length` tokens and of `rows` completions of `length` tokens.

    A layer is allocated when it is first written to, with the heads, size, dtype and device of what is written. It
    begins as zeros: what is masked weighs 0, which does not hide a NaN that happens to be in unused memory.
    """

    def __init__(self, *, groups: int, prompt_length: int, rows: int, length: int):
        self.groups, self.prompt_length, self.rows, self.length = groups, prompt_length, rows, length
        self.layers: dict[int, LayerCache] = {}

    def layer(self, index: int, key: Tensor) -> LayerCache:
        """The layer's memory; `key` (B, Hk, N, D) is about to be written to it."""
        if index not in self.layers:
            _, heads, _, size = key.shape
            prompts = key.new_zeros(2, self.groups, heads, self.prompt_length, size)
            self.layers[index] = LayerCache(prompts, key.new_zeros(2, self.rows, heads, self.length, size))
        return self.layers[index]

    def move_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies the first `length` own keys and values of some rows to others."""
        source, target = self._places(sources, targets)
        for layer in self.layers.values():
            layer.own[:, target, :, :length] = layer.own[:, source, :, :length]

    def move_groups(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the keys and values of some prompts to others."""
        source, target = self._places(sources, targets)
        for layer in self.layers.values():
            layer.prompts[:, target] = layer.prompts[:, source]

    def _places(self, *places: Sequence[int]) -> Tensor:
        """Once on the device, instead of by every layer."""
        return torch.tensor(places, device=next(iter(self.layers.values())).own.device)


class Rows:
    """What is known of each row: room for `rows` completions of `length` tokens."""

    def __init__(self, rows: int, length: int, device: torch.device):
        self.uniforms = torch.zeros(rows, length, device=device)  # the random numbers behind its tokens
        self.ages = torch.zeros(rows, dtype=torch.long, device=device)  # place of its last token
        self.last = torch.zeros(rows, dtype=torch.long, device=device)  # that token
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)  # whether an EOS was among its tokens
        self.tokens = torch.zeros(rows, length, dtype=torch.long, device=device)
        self.logps = torch.zeros(rows, length, device=device)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies some rows to others."""
        for state in vars(self).values():
            state[targets] = state[sources]
