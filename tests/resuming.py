"""What two runs must agree in to be the same run."""

import random
from typing import Any

import numpy as np
import torch

TIMES = ("runtime", "per_second", "seconds", "step_time")


def history(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without times."""
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in TIMES)}
        for entry in log_history
    ]


def outcome(run) -> dict[str, Any]:
    """Everything that a run has led to, by name, as plain values and tensors. Call it right after `train`."""
    python, numpy = random.getstate(), np.random.get_state()
    return {
        "weights": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        "optimizer": run.optimizer.state_dict()["state"],
        "schedule": run.lr_scheduler.state_dict(),
        "random": {"torch": torch.get_rng_state(), "numpy": numpy[1].tolist(), "python": list(python[1])},
        "log": history(run.state.log_history),
        "steps": run.state.global_step,
        "num_tokens": run.num_tokens,
        "prompts": run.prompt_memory.table(),
    }


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Names of the values that are not the same to the last bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        return [
            name
            for key in keys
            for name in (
                differences(first[key], second[key], f"{path}/{key}")
                if key in first and key in second
                else [f"{path}/{key} is in one only"]
            )
        ]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [name for i, pair in pairs for name in differences(*pair, f"{path}/{i}")]
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [path]
    same = first == second or (first != first and second != second)
    return [] if same else [f"{path}: {first!r:.300} and {second!r:.300}"]
