"""The functions of `trl.rewards`, by dotted path or passed as they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

from trl.trainer.utils import get_callable_name

from .text import OnMessages

# functions that make a reward function, and what stands for it here
_FACTORIES = {"get_soft_overlong_punishment": "soft_overlong", "get_repetition_penalty_reward": "repetition"}


def adapt_trl_function(func: Callable[..., Any]) -> Callable[..., Any]:
    """Any other function as it is; one of `trl.rewards` so that it reads plain text too.

    Raises:
        ValueError: `trl.rewards.get_...`, which makes a reward function and is none itself.
    """
    inner: Any = func
    while isinstance(inner, partial):
        inner = inner.func
    # not by `__module__`, which functools.wraps copies to a user's wrapper
    defined_in = getattr(inner, "__globals__", {}).get("__name__") or type(inner).__module__
    if not defined_in.startswith("trl.rewards"):
        return func
    name = get_callable_name(inner)
    if name.startswith("get_"):
        registered = f"use the registered name {_FACTORIES[name]!r}, or " if name in _FACTORIES else ""
        raise ValueError(
            f"trl.rewards.{name} makes a reward function and is none itself; {registered}pass what it returns, "
            f"`{name}(...)`, or assign that to a name in a module of your own and give that name's dotted path."
        )
    return OnMessages(func, name)
