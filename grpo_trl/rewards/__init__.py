"""How completions are scored. Names are imported on first use: an isolated reward's process loads only its own."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .format import answer_format, think_format
    from .length import LengthPenalty
    from .loading import check_rewards, load_rewards
    from .math import AccuracyReward, accuracy, exact_match, reasoning_accuracy
    from .model import RewardModel
    from .registry import REWARDS, resolve_reward, reward_name
    from .scoring import RewardScorer
    from .text import completion_texts, final_answer

_MODULES = {
    "REWARDS": "registry",
    "AccuracyReward": "math",
    "LengthPenalty": "length",
    "RewardModel": "model",
    "RewardScorer": "scoring",
    "accuracy": "math",
    "answer_format": "format",
    "check_rewards": "loading",
    "completion_texts": "text",
    "exact_match": "math",
    "final_answer": "text",
    "load_rewards": "loading",
    "reasoning_accuracy": "math",
    "resolve_reward": "registry",
    "reward_name": "registry",
    "think_format": "format",
}
__all__ = [
    "REWARDS",
    "AccuracyReward",
    "LengthPenalty",
    "RewardModel",
    "RewardScorer",
    "accuracy",
    "answer_format",
    "check_rewards",
    "completion_texts",
    "exact_match",
    "final_answer",
    "load_rewards",
    "reasoning_accuracy",
    "resolve_reward",
    "reward_name",
    "think_format",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
