"""From what a user writes (a name, a dotted path, a function) to a reward function.

A reward function is `(prompts, completions, **columns) -> list[float | None]`; None means "not applicable".
"""

import importlib
from collections.abc import Callable
from typing import Any

from trl.trainer.utils import get_callable_name

from .format import answer_format, think_format
from .length import LengthPenalty, repetition, soft_overlong
from .math import AccuracyReward, ReasoningAccuracyReward, accuracy, exact_match, reasoning_accuracy
from .trl_functions import adapt_trl_function

RewardFunction = Callable[..., Any]

# name -> (max_completion_length -> reward function)
REWARDS: dict[str, Callable[[int], RewardFunction]] = {
    "accuracy": lambda max_completion_length: accuracy,
    "reasoning_accuracy": lambda max_completion_length: reasoning_accuracy,
    "exact_match": lambda max_completion_length: exact_match,
    "think_format": lambda max_completion_length: think_format,
    "answer_format": lambda max_completion_length: answer_format,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
    "length": LengthPenalty,
}
GOLD_READERS = ("accuracy", "reasoning_accuracy", "exact_match")
# what a recipe of TRL's script may say -> the name of REWARDS that stands for it; docs/rewards.md has the differences
TRL_NAMES = {
    "accuracy_reward": "accuracy",
    "reasoning_accuracy_reward": "reasoning_accuracy",
    "think_format_reward": "think_format",
    "get_soft_overlong_punishment": "soft_overlong",
}


def resolve_reward(spec: str | RewardFunction, *, max_completion_length: int) -> RewardFunction:
    """The reward function that `spec` names.

    Args:
        spec: a callable (returned as it is; TRL's own read plain text too), a name of `REWARDS` or one of TRL's
            (`TRL_NAMES`), or a dotted path:
            `package.module.function` or `package.module:function`.
        max_completion_length: tokens; what the length rewards are relative to.

    Raises:
        ValueError: the name is unknown, or the path leads to no callable.
    """
    if callable(spec):
        return adapt_trl_function(spec)
    if not isinstance(spec, str):
        raise ValueError(f"A reward is a callable, a name or a dotted path; got {spec!r} ({type(spec).__name__}).")
    name = TRL_NAMES.get(spec, spec)
    if name in REWARDS:
        return REWARDS[name](max_completion_length)
    module_name, _, attribute = spec.rpartition(":" if ":" in spec else ".")
    if not module_name or not attribute or "/" in spec:
        raise ValueError(
            f"Reward {spec!r} is unknown. Registered: {', '.join(sorted(REWARDS))}. For a function of your own give "
            "its dotted path (package.module.function); for a reward model use RewardModel(path)."
        )
    return _import_function(spec, module_name, attribute)


def reads_gold(spec: str | RewardFunction) -> bool:
    """Whether it is one of ours that compares with the columns `answer` and `solution`."""
    ours = spec is exact_match or type(spec) in (AccuracyReward, ReasoningAccuracyReward)  # a subclass may read others
    return ours or TRL_NAMES.get(str(spec), spec) in GOLD_READERS


def reward_name(func: RewardFunction) -> str:
    """What logs and errors call a reward: `__name__` (of the inner function of a partial), else the class name."""
    return get_callable_name(func)


def _import_function(spec: str, module_name: str, attribute: str) -> RewardFunction:
    try:
        func = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Reward {spec!r} is no registered name ({', '.join(sorted(REWARDS))}) and cannot be imported: {error}. "
            "A dotted path is package.module.function, its package on sys.path (set PYTHONPATH, or install it)."
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"Reward {spec!r}: its module {module_name} ends with an error when it is imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(func):
        raise ValueError(f"Reward {spec!r} is a {type(func).__name__}; expected a function or a callable object.")
    return adapt_trl_function(func)
