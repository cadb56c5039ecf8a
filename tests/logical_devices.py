"""Two logical devices, `vgpu:0` and `vgpu:1`, on a torch without GPU: real data, real autograd, and an error for every
operation that mixes devices.

A tensor of a logical device is a wrapper around one of the CPU. `__torch_dispatch__` compares the devices of all
arguments, as CUDA's kernels do, before the operation runs on the CPU data. `CROSSINGS` lists what went from one device
to another. Importing this registers a backend for the whole process, so tests do it in a child
(`two_devices_run.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "vgpu"
_setup_privateuseone_for_python_backend(NAME)

COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default}
CPU = torch.device("cpu")


class DeviceMismatch(RuntimeError):
    """An operation on tensors of several devices."""


@dataclass(frozen=True)
class Crossing:
    """Data that moved: from where to where, and how much."""

    source: str
    target: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int


CROSSINGS: list[Crossing] = []


class LogicalTensor(Tensor):
    """Lies on `device` by what it says, on the CPU by its data."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data, device):
        return Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=device,
        )  # fmt: skip

    def __init__(self, data, device):
        self.on_cpu = data

    def __repr__(self):
        return f"LogicalTensor({self.on_cpu}, {self.device})"

    def tolist(self):
        record(self, CPU)
        return self.on_cpu.tolist()

    def numpy(self, **kwargs):
        raise TypeError(f"cannot make a numpy array of a tensor on {self.device}; use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class LogicalDevices(TorchDispatchMode):
    """Inside, factories (`zeros(..., device="vgpu:1")`), which have no tensor among their arguments, work too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def record(tensor: Tensor, target: torch.device) -> None:
    """Notes that the tensor's data go to `target`."""
    if tensor.device != target:
        size = tensor.numel() * tensor.element_size()
        CROSSINGS.append(Crossing(str(tensor.device), str(target), tensor.dtype, tuple(tensor.shape), size))


def run(func, args, kwargs):
    """An operation on CPU data, its result on the device of its arguments; refuses arguments of several devices."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = _with_index(kwargs.get("device"))
    # a number on the CPU may be mixed with anything, as on CUDA
    devices = [tensor.device for tensor in tensors if tensor.dim() or tensor.device != CPU]
    if func in COPIES:
        record(tensors[1], tensors[0].device)
    elif func is torch.ops.aten._to_copy.default and target is not None:
        record(tensors[0], target)
    elif func is torch.ops.aten._local_scalar_dense.default:
        record(tensors[0], CPU)
    elif len(set(devices)) > 1 and not _is_index_on_cpu(func, devices):
        raise DeviceMismatch(f"{func} mixes {', '.join(sorted({str(device) for device in devices}))}")
    device = target or (devices[0] if devices else CPU)
    wrappers = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, LogicalTensor)}

    def wrapped(result):
        if not isinstance(result, Tensor):
            return result
        if id(result) in wrappers:  # an operation in place returns its argument
            return wrappers[id(result)]
        return LogicalTensor(result, device) if device.type == NAME else result

    options = tree_map(_data, kwargs) | ({} if target is None else {"device": CPU})
    return tree_map(wrapped, func(*tree_map(_data, args), **options))


def _is_index_on_cpu(func, devices: list[torch.device]) -> bool:
    return func is torch.ops.aten.index.Tensor and all(device in (devices[0], CPU) for device in devices)


def _with_index(device) -> torch.device | None:
    device = None if device is None else torch.device(device)
    return torch.device(NAME, device.index or 0) if device is not None and device.type == NAME else device


def _data(leaf):
    return leaf.on_cpu if isinstance(leaf, LogicalTensor) else leaf


# C++ code below the dispatch mode (`torch.tensor(..., device=...)`) allocates and copies by itself
def _kernel(func):
    return lambda *args, **kwargs: run(func, args, kwargs)


def _copy_from(source, target, non_blocking=False):
    record(source, target.device)
    _data(target).copy_(_data(source))
    return target


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("empty_strided", _kernel(torch.ops.aten.empty_strided.default), "PrivateUse1")
_LIBRARY.impl("empty.memory_format", _kernel(torch.ops.aten.empty.memory_format), "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")

# a wrapper made in inference mode cannot be viewed outside of it, nor the other way round
torch.inference_mode.__enter__ = torch.no_grad.__enter__
torch.inference_mode.__exit__ = torch.no_grad.__exit__

getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch.autocast asks, though it is disabled
