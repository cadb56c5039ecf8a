"""Copies of weights for decoding: in 16 bit (CUDA, under autocast), or packed (CPU, fp32)."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from psutil import virtual_memory
from torch import Tensor, nn

ROWS_AT_A_TIME = 8  # oneDNN makes a kernel for each number of rows of each size of layer: half a MiB, half a ms
PACKED_FOR_ROWS = 64  # the order of a packed weight is the same for any number of rows but the smallest
MOST_PACKED = 1 / 8  # of the machine's memory; what is free now would make a run depend on its neighbours


class LowPrecisionWeights:
    """Copies of the weights of linear layers in the dtype that autocast would cast them to in every decoding step.

    While `active`, the layers use the copies: the same numbers, but read once instead of cast (6 bytes a weight moved
    instead of 2). Everything else - embeddings, norms - stays as it is, and so does the rest of autocast.

    The copies lie one behind the other in the order of the modules, so that those of neighbours that read the same
    input, as query, key and value, are one matrix (`joined`).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype == torch.float32]
        self.copies: list[nn.Parameter] = []
        for device, layers in groupby(self.layers, key=lambda layer: layer.weight.device):
            weights = [layer.weight.detach() for layer in layers]
            memory = torch.empty(sum(map(torch.numel, weights)), dtype=dtype, device=device)
            parts = memory.split([weight.numel() for weight in weights])
            copies = (part.view_as(weight).copy_(weight) for part, weight in zip(parts, weights, strict=True))
            self.copies += [nn.Parameter(copy, requires_grad=False) for copy in copies]

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
            self._use(self.copies)
            yield
        finally:
            try:
                self._use(own)
            except BaseException:  # a signal: layers would keep their copies, and a checkpoint have them
                self._use(own)
                raise

    def _use(self, weights: Sequence[Any]) -> None:
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = weight


def is_wrapped(weight: Tensor) -> bool:
    """Quantised by torchao, or sharded: without memory of its own."""
    return hasattr(weight, "__tensor_flatten__")


def joined(weights: Sequence[Tensor]) -> Tensor | None:
    """Matrices (n_i, d) that lie one behind the other in the same memory as one (sum of n_i, d), else None."""
    if any(map(is_wrapped, weights)):
        return None
    first, rows = weights[0], sum(map(len, weights))
    place = first.storage_offset()
    for weight in weights:
        same_memory = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        same_kind = (weight.dtype, weight.shape[1], weight.stride()) == (first.dtype, first.shape[1], first.stride())
        if not (same_memory and same_kind and weight.is_contiguous() and weight.storage_offset() == place):
            return None
        place += weight.numel()
    return first.as_strided((rows, first.shape[1]), first.stride())


class PackedLinear:
    """Plain linear layers that read the same input (n, d) -> (n, sum of d_i), as one product by oneDNN.

    The copy of their weights is in the order in which its kernels read them: with few rows, or some dozens, a product
    takes half the time and less. The two operations are private: what torch.compile makes of linear layers.
    """

    def __init__(self, layers: Sequence[nn.Linear]):
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), PACKED_FOR_ROWS)
        self.bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases).detach()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


def may_be_packed(weights: Sequence[Tensor]) -> bool:
    """Whether these can be packed, and are not too many for a second copy."""
    possible = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    fit = all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
    small = sum(w.nbytes for w in weights) <= MOST_PACKED * virtual_memory().total
    return possible and fit and small and not any(map(is_wrapped, weights)) and not torch.is_autocast_enabled("cpu")
