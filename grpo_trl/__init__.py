"""Group-native GRPO for the Hugging Face stack. Public names are imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .algorithm import VARIANTS
    from .batch import Group, Prompt, RolloutBatch
    from .config import GRPOConfig
    from .data import load_datasets
    from .rewards import REWARDS, RewardModel
    from .rollouts import ENGINES
    from .trainer import GRPOTrainer

__version__ = "0.1.0"

_MODULES = {
    "ENGINES": "rollouts",
    "GRPOConfig": "config",
    "GRPOTrainer": "trainer",
    "Group": "batch",
    "Prompt": "batch",
    "REWARDS": "rewards",
    "RewardModel": "rewards",
    "RolloutBatch": "batch",
    "VARIANTS": "algorithm",
    "load_datasets": "data",
}

__all__ = [
    "ENGINES",
    "REWARDS",
    "VARIANTS",
    "GRPOConfig",
    "GRPOTrainer",
    "Group",
    "Prompt",
    "RewardModel",
    "RolloutBatch",
    "load_datasets",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
