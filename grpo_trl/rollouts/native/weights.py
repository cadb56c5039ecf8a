"""16-bit copies of fp32 weights for decoding."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class LowPrecisionWeights:
    """Copies of the weights of linear layers in the dtype that autocast would cast them to in every decoding step.

    While `active`, the layers use the copies: the same numbers, but read once instead of cast (6 bytes a weight moved
    instead of 2). Everything else - embeddings, norms - stays as it is, and so does the rest of autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.float32]
        self.copies = [nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False) for layer in self.layers]

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the current weights, in place."""
        for layer, copy in zip(self.layers, self.copies, strict=True):
            copy.copy_(layer.weight)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The layers use the copies; their own weights come back, also after an exception."""
        own = [layer.weight for layer in self.layers]
        try:
            for layer, copy in zip(self.layers, self.copies, strict=True):
                layer.weight = copy
            yield
        finally:
            for layer, weight in zip(self.layers, own, strict=True):
                layer.weight = weight
