"""Calls the reward functions on groups of completions: `RewardScorer.score`."""

import asyncio
import math
import numbers
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging
from trl.trainer.utils import is_async_callable, shutdown_event_loop_in_daemon, start_event_loop_in_daemon

from ..batch import Group
from .isolation import IsolatedFunction, RewardTimeoutError
from .model import RewardModel
from .registry import RewardFunction, reward_name

logger = logging.get_logger(__name__)

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # as in TRL: passed under other names, or the sampled ids
RESERVED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


class RewardScorer:
    """Scores groups with F reward functions.

    Every function gets TRL's keyword arguments: `prompts`, `completions`, `completion_ids`, the columns of the dataset
    (one value per completion; None where a row of a mixed dataset lacks the column), `trainer_state`, `log_extra`,
    `log_metric`. Async functions run concurrently, beside the plain ones.

    Args:
        reward_funcs: F callables; `resolve_reward` makes them from names.
        names: what logs and errors call them; default `reward_name`, numbered where two are the same.
        timeout: seconds per call, None: no limit. Plain functions then run in a process of their own each, which is
            killed on expiry; there `trainer_state` is a copy. Async functions are cancelled at their next await.
            Reward models and `accuracy` (which has its own time-out) are exempt.

    Raises:
        ValueError: no function, a wrong number of names, or a function that cannot be sent to its own process.
    """

    def __init__(
        self,
        reward_funcs: Sequence[RewardFunction],
        names: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
    ):
        if not reward_funcs:
            raise ValueError("No reward function was given; at least one is needed to score completions.")
        if names is not None and len(names) != len(reward_funcs):
            raise ValueError(f"{len(names)} names were given for {len(reward_funcs)} reward functions: {list(names)}.")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds, or None for no limit.")
        self.reward_funcs = list(reward_funcs)
        self.names = _unique(names or [reward_name(func) for func in reward_funcs])
        for func, name in zip(self.reward_funcs, self.names, strict=True):
            if isinstance(func, RewardModel):
                func.__name__ = name  # what its own metrics are called: two models of one name would share them
        self.timeout = timeout
        self._calls = [self._callable(func, name) for func, name in zip(self.reward_funcs, self.names, strict=True)]
        self._loop: tuple[Any, asyncio.AbstractEventLoop] | None = None  # one for all calls: async clients stay valid
        self._loop_lock = threading.Lock()
        self._warned_all_none = False

    def score(
        self,
        groups: Sequence[Group],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **extra: Any,
    ) -> Tensor:
        """Rewards of all completions, (B, F) fp32 on the CPU, rows in the order of the groups; NaN: not applicable.

        Args:
            groups: any number, their `completions` filled.
            trainer_state, log_extra, log_metric: handed to the functions.
            extra: further keyword arguments for them; a list of B values is taken as one per completion.

        Raises:
            RuntimeError: a function raised; names the function and the first row that fails alone.
            RewardTimeoutError (a TimeoutError): a function took longer than `timeout`.
            ValueError: a wrong count, NaN, infinity or a non-number; names function, row and value.
        """
        rows = rows_of(groups)
        count = len(rows["completions"])
        rows |= {key: value for key, value in extra.items() if isinstance(value, list) and len(value) == count}
        shared = {key: value for key, value in extra.items() if key not in rows}
        shared |= {"trainer_state": trainer_state, "log_extra": log_extra, "log_metric": log_metric}
        pending = {i: self._submit(i, rows | shared) for i, f in enumerate(self.reward_funcs) if is_async_callable(f)}
        plain = [i for i in range(len(self.names)) if i not in pending]
        try:
            outputs = {i: self._call(i, rows, shared) for i in plain}
            outputs |= {i: self._wait(i, future, rows, shared) for i, future in pending.items()}
        except BaseException:
            for future in pending.values():
                future.cancel()
            raise
        columns = [to_rewards(outputs[i], count, name) for i, name in enumerate(self.names)]
        rewards_per_func = torch.stack(columns, dim=1)
        self._warn_if_all_none(rewards_per_func, rows)
        return rewards_per_func

    def close(self) -> None:
        """Ends the functions' processes and the event loop; runs at interpreter exit too. Scoring again restarts."""
        for call in self._calls:
            close = getattr(call, "close", None)
            if callable(close):
                close()
        with self._loop_lock:
            if self._loop is not None:
                shutdown_event_loop_in_daemon(*self._loop)
                self._loop = None

    def _callable(self, func: RewardFunction, name: str) -> RewardFunction:
        if self.timeout is None or _stays_in_process(func) or is_async_callable(func):
            return func
        return IsolatedFunction(func, name=name, timeout=self.timeout)

    def _call(self, index: int, rows: dict[str, list], shared: dict[str, Any]) -> Any:
        call, name = self._calls[index], self.names[index]
        if isinstance(call, IsolatedFunction):
            shared = shared | {"trainer_state": _snapshot(shared["trainer_state"])}
        try:
            return _read(call(**rows, **shared))
        except RewardTimeoutError:
            raise
        except Exception as error:
            attempts = (lambda row=row: _read(call(**row)) for row in _one_by_one(rows, shared))
            raise RuntimeError(_describe_failure(attempts, name, rows, error)) from error

    def _submit(self, index: int, kwargs: dict[str, Any]) -> Future:
        with self._loop_lock:
            if self._loop is None:
                thread, loop, ready = start_event_loop_in_daemon(name="rewards")
                ready.wait()
                self._loop = (thread, loop)
            coroutine = _await_within(self.timeout, self._calls[index], self.names[index], kwargs)
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop[1])

    def _wait(self, index: int, future: Future, rows: dict[str, list], shared: dict[str, Any]) -> Any:
        try:
            return future.result()
        except RewardTimeoutError:
            raise
        except Exception as error:
            # all at once: one after the other, a slow judge would take as many times longer as there are rows
            attempts = [self._submit(index, row) for row in _one_by_one(rows, shared)]
            message = _describe_failure([attempt.result for attempt in attempts], self.names[index], rows, error)
            for attempt in attempts:
                attempt.cancel()
            raise RuntimeError(message) from error

    def _warn_if_all_none(self, rewards_per_func: Tensor, rows: dict[str, list]) -> None:
        all_none = rewards_per_func.isnan().all(1)
        if self._warned_all_none or not all_none.any():
            return
        self._warned_all_none = True
        row = int(all_none.nonzero()[0])
        logger.warning(
            f"All reward functions ({', '.join(self.names)}) returned None for the following row:\n"
            f"{ {key: values[row] for key, values in rows.items()} }\n"
            "Please ensure that at least one reward function returns a valid reward. Such rows have no advantage; "
            "this is said once."
        )


def rows_of(groups: Sequence[Group]) -> dict[str, list]:
    """What is given per completion: prompts, completions, completion_ids and every column, each a list of B values."""
    if not groups:
        raise ValueError("There are no groups to score; give at least one.")
    for group in groups:
        if len(group.completions) != len(group):
            raise ValueError(
                f"A group of {len(group)} sampled completions has {len(group.completions)} texts; fill "
                "Group.completions (text, or messages) before scoring."
            )
    examples = [group.prompt.example for group in groups for _ in range(len(group))]
    columns = dict.fromkeys(key for group in groups for key in group.prompt.example if key not in NOT_COLUMNS)
    if clashes := [key for key in columns if key in RESERVED]:
        raise ValueError(f"Dataset columns {clashes} clash with arguments of reward functions; rename or remove them.")
    return {
        "prompts": [example["prompt"] for example in examples],
        "completions": [completion for group in groups for completion in group.completions],
        "completion_ids": [ids for group in groups for ids in group.completion_ids],
        **{key: [example.get(key) for example in examples] for key in columns},
    }


def to_rewards(output: Any, count: int, name: str) -> Tensor:
    """A function's output -> (count,) fp32, None as NaN. Raises ValueError as `RewardScorer.score` says."""
    # a set has no order (and holds equal rewards once), so its values belong to no row
    is_scalar = getattr(output, "ndim", None) == 0  # of torch or numpy, which call themselves iterable
    if is_scalar or not isinstance(output, Iterable) or isinstance(output, (str, bytes, Mapping, Set)):
        raise ValueError(
            f"Reward function {name!r} returned {output!r:.100} ({type(output).__name__}); expected a list of {count} "
            "rewards, one per completion (numbers, or None where it does not apply)."
        )
    values = list(output)
    if len(values) != count:
        raise ValueError(
            f"Reward function {name!r} returned {len(values)} rewards, but {count} were expected: one per completion."
        )
    return torch.tensor([_to_float(value, row, name) for row, value in enumerate(values)], dtype=torch.float32)


def _to_float(value: Any, row: int, name: str) -> float:
    if value is None:
        return math.nan
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if not isinstance(value, numbers.Real):
        problem = f"({type(value).__name__}) for row {row}; expected a number"
    elif not abs(cast(float, value)) <= torch.finfo(torch.float32).max:  # NaN compares False
        problem = f"for row {row}; expected a finite number within fp32"
    else:
        return float(value)
    raise ValueError(f"Reward function {name!r} returned {value!r:.100} {problem}, or None where it does not apply.")


def _stays_in_process(func: RewardFunction) -> bool:
    """Models, and rewards that bring a process of their own."""
    return isinstance(func, nn.Module) or getattr(func, "in_process", False)


def _snapshot(trainer_state: Any) -> Any:
    """The trainer's state by its attributes: as a TrainerState it would make every child import transformers."""
    return trainer_state if trainer_state is None else SimpleNamespace(**vars(trainer_state))


async def _await_within(timeout: float | None, func: RewardFunction, name: str, kwargs: dict[str, Any]) -> Any:
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            return _read(await func(**kwargs))
    except TimeoutError as error:
        if not scope.expired():  # the function's own
            raise
        raise RewardTimeoutError(
            f"Async reward function {name!r} took longer than its time-out of {timeout:g} s and was cancelled. Raise "
            "reward_timeout, or make the function return in time."
        ) from error


def _read(output: Any) -> Any:
    """A generator runs when it is read: what it raises then is the function's error."""
    return list(output) if isinstance(output, Iterator) else output


def _one_by_one(rows: dict[str, list], shared: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The arguments for each row alone."""
    quiet = shared | {key: _ignore for key in ("log_extra", "log_metric") if shared[key] is not None}
    for row in range(len(rows["completions"])):
        yield {key: [values[row]] for key, values in rows.items()} | quiet


def _describe_failure(
    attempts: Iterable[Callable[[], Any]], name: str, rows: dict[str, list], error: Exception
) -> str:
    """Of a function that failed on all rows, and the attempts to call it with each row alone: the first that fails."""
    for row, attempt in enumerate(attempts):
        try:
            attempt()
        except Exception as row_error:
            prompt, completion = rows["prompts"][row], rows["completions"][row]
            return (
                f"Reward function {name!r} failed on row {row}: {type(row_error).__name__}: {row_error}. "
                f"Prompt: {reprlib.repr(prompt)}; completion: {reprlib.repr(completion)}"
            )
    return (
        f"Reward function {name!r} failed on all rows together, though on none of them alone: "
        f"{type(error).__name__}: {error}"
    )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes the place of log_extra and log_metric while rows are tried again: they would log twice."""


def _unique(names: Sequence[str]) -> list[str]:
    """Numbers names that occur again ("f", "f_2"), or their metrics would be one."""
    seen: dict[str, int] = {}
    for position, name in enumerate(names):
        unique, number = name, 1
        while unique in seen:
            number += 1
            unique = f"{name}_{number}"
        seen[unique] = position
    return list(seen)
