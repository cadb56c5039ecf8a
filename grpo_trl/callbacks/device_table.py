"""What is where: a table of the models of a run, shown when training begins."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerCallback
from trl.trainer.utils import get_config_model_id

from ..policy import FrozenReference, Reference, causal_lm
from ..rewards import RewardModel

logger = logging.getLogger(__name__)

COLUMNS = ("model", "device", "dtype", "parameters", "size")


@dataclass(frozen=True)
class ModelRow:
    """One model, in words."""

    model: str
    device: str  # several: it is split over them
    dtype: str  # the most frequent first
    parameters: str
    size: str  # of parameters and buffers


def model_rows(policy: nn.Module, reference: Reference | None, rewards: Iterable[Any]) -> list[ModelRow]:
    """Policy, reference (none without KL term) and the reward models of `rewards`, sharded ones in whole."""
    rows = [_row("policy", policy, trained=True)]
    if isinstance(reference, FrozenReference):
        rows.append(_row("reference", reference.model))
    elif reference is not None:
        adapter = getattr(reference, "adapter", None)
        kind = "adapter off" if adapter is None else "first adapter"
        rows.append(ModelRow(f"reference: the policy, {kind}", rows[0].device, rows[0].dtype, "shared", "shared"))
    rows += [_row(f"reward {reward.__name__}", reward.model) for reward in rewards if isinstance(reward, RewardModel)]
    return rows


def device_table(rows: Iterable[ModelRow]) -> Table:
    """The rows as a table for the console."""
    table = Table(*COLUMNS, title="What is where")
    for row in rows:
        table.add_row(*astuple(row))
    return table


class DeviceTableCallback(TrainerCallback):
    """Shows `device_table` on the main process; with `disable_tqdm`, its rows go to the log at level info instead."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        rows = model_rows(self.trainer.model, self.trainer.reference, self.trainer.scorer.reward_funcs)
        if not args.disable_tqdm:
            Console().print(device_table(rows))
            return
        for row in rows:
            logger.info("%s", ", ".join(astuple(row)))


def _row(name: str, model: nn.Module, *, trained: bool = False) -> ModelRow:
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    total = sum(map(_count, parameters))
    count = _short(total)
    if trained:
        learning = sum(_count(p) for p in parameters if p.requires_grad)
        count += ", all trained" if learning == total else f", {_short(learning)} trained"
    devices = Counter("offloaded" if tensor.device.type == "meta" else str(tensor.device) for tensor in parameters)
    dtypes: Counter[str] = Counter()
    for parameter in parameters:
        dtypes[_dtype(parameter)] += _count(parameter)
    path = get_config_model_id(causal_lm(model).config).rstrip("/").split("/")[-1]
    return ModelRow(
        f"{name} {path}".strip() if trained or name == "reference" else name,
        ", ".join(sorted(devices)),
        ", ".join(name for name, _ in dtypes.most_common()),
        count,
        _size(sum(_stored(tensor) * tensor.element_size() for tensor in tensors)),
    )


def _stored(tensor: torch.Tensor) -> int:
    return getattr(tensor, "ds_numel", tensor.numel())  # ZeRO-3 leaves an empty tensor


def _count(parameter: torch.Tensor) -> int:
    """bitsandbytes keeps two weights of 4 bits in a byte."""
    return _stored(parameter) * (2 * parameter.element_size() if _is_4bit(parameter) else 1)


def _dtype(parameter: torch.Tensor) -> str:
    if _is_4bit(parameter):
        return "4-bit"
    return "8-bit" if parameter.dtype == torch.int8 else str(parameter.dtype).removeprefix("torch.")


def _is_4bit(parameter: torch.Tensor) -> bool:
    return type(parameter).__name__ == "Params4bit"


def _short(count: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def _size(num_bytes: int) -> str:
    unit, factor = ("GiB", 2**30) if num_bytes >= 2**30 else ("MiB", 2**20)
    return f"{num_bytes / factor:.2f} {unit}"
