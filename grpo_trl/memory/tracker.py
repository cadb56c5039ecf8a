"""Counts the bytes of tensors that are alive while code runs on fake tensors: what an allocator would hold."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# What kernels allocate inside, where no dispatch is seen: operation -> bytes, given its arguments
WORKSPACES = {
    aten.logsumexp: lambda x, *args, **kwargs: x.nbytes,  # exp(x - max)
    aten.cumsum: lambda x, *args, dtype=None, **kwargs: x.numel() * dtype.itemsize if dtype else 0,  # x as that dtype
}


class LiveBytes(TorchDispatchMode):
    """While it is active, `live` is the size of all storages made in it that still exist, `peak` the largest so far.

    Storages that exist before count nothing: pass them as `known`.
    """

    def __init__(self, known: Any = ()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_sum_of_gradients(func, args, kwargs):
            return args[0]
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:  # oneDNN's have no storage
                self._add(tensor.untyped_storage())
        workspace = WORKSPACES.get(func.overloadpacket)
        if workspace is not None:
            self.peak = max(self.peak, self.live + workspace(*args, **kwargs))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _is_sum_of_gradients(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether autograd adds up what several uses of a tensor give. It does so in place, but not under a dispatch mode:
    then the sum would count a third time."""
    if func is not aten.add.Tensor or kwargs or torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return False
    first, second = args[:2]
    return isinstance(second, Tensor) and first.shape == second.shape and first.dtype == second.dtype
