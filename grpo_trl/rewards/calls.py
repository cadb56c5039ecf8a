"""One call of a reward function, `Call`, and what several of them become together."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..batch import Group
from .isolation import IsolatedFunction, RewardTimeoutError, read
from .rows import describe_failure, describe_timeout, one_by_one, rows_of, to_rewards

LOGS_SENT = 100  # of `trainer_state.log_history`, to a function in a process of its own


@dataclass
class Call:
    """A reward function and the groups to score with it. `run` (in any thread) or `run_async` fills in the rest."""

    func: Callable[..., Any]
    index: int  # of the function
    name: str
    groups: list[Group]
    trainer_state: Any
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # (rows of the groups,) fp32 on the CPU
    logs: list[tuple[str, tuple]] = field(default_factory=list)  # calls of log_extra and log_metric
    seconds: float = 0.0
    cancelled: bool = False  # nobody waits for it any more

    def __post_init__(self):
        self.rows = rows_of(self.groups)
        if isinstance(self.func, IsolatedFunction):
            self.trainer_state = _snapshot(self.trainer_state)

    def run(self) -> None:
        """Calls a plain function, without gradients.

        Raises:
            RuntimeError, RewardTimeoutError, ValueError: as `RewardScorer.score` says.
        """
        start = time.perf_counter()
        try:
            output = _output(self.func, self._arguments())
        except RewardTimeoutError as error:
            raise RewardTimeoutError(describe_timeout(error, self.rows)) from error
        except Exception as error:
            if self.cancelled:
                raise
            failing = _first_error([lambda row=row: _output(self.func, row) for row in self._single_rows()])
            raise RuntimeError(describe_failure(failing, self.name, self.rows, error)) from error
        self._take(output, start)

    async def run_async(self, timeout: float | None) -> None:
        """Awaits an async function, for at most `timeout` seconds. Raises what `run` does."""
        start = time.perf_counter()
        try:
            output = await _within(timeout, self.func, self.name, self._arguments())
        except RewardTimeoutError as error:
            raise RewardTimeoutError(describe_timeout(error, self.rows)) from error
        except Exception as error:
            # all at once: one after the other, a slow judge would take as many times longer as there are rows
            attempts = [_within(timeout, self.func, self.name, row) for row in self._single_rows()]
            failing = await _first_async_error([asyncio.ensure_future(attempt) for attempt in attempts])
            raise RuntimeError(describe_failure(failing, self.name, self.rows, error)) from error
        self._take(output, start)

    @property
    def columns(self) -> list[str]:
        """Those that `log_extra` was called with."""
        return [args[0] for key, args in self.logs if key == "log_extra"]

    def _take(self, output: Any, start: float) -> None:
        self.rewards = to_rewards(output, len(self.rows["completions"]), self.name)
        self.seconds = time.perf_counter() - start

    def _arguments(self) -> dict[str, Any]:
        def log_extra(column: str, values: list[Any]) -> None:
            if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
                raise TypeError(f"log_extra({column!r}, {values!r:.100}): expected a list, one value per completion.")
            self.logs.append(("log_extra", (column, list(values))))  # as it is now: some fill one list again and again

        def log_metric(name: str, value: float) -> None:
            self.logs.append(("log_metric", (name, value)))

        return self.rows | {"trainer_state": self.trainer_state, "log_extra": log_extra, "log_metric": log_metric}

    def _single_rows(self) -> list[dict[str, Any]]:
        """The arguments for each row alone, without logs: rows that are tried again would log twice."""
        others = {"trainer_state": self.trainer_state, "log_extra": _ignore, "log_metric": _ignore}
        return [row | others for row in one_by_one(self.rows)]


def in_order(calls: Sequence[Call], groups: Sequence[Group], count: int) -> Tensor:
    """The rewards of the calls as (B, F), rows in the order of the groups."""
    by_group: list[dict[int, Tensor]] = [{} for _ in range(count)]
    for call in calls:
        parts = call.rewards.split([len(group) for group in call.groups])
        by_group[call.index] |= {id(group): part for group, part in zip(call.groups, parts, strict=True)}
    return torch.stack([torch.cat([found[id(group)] for group in groups]) for found in by_group], dim=1)


def replay(calls: Sequence[Call], shown: dict[tuple[int, str], str], **log: Callable[..., None] | None) -> None:
    """Hands on what the functions logged. A column that only some calls of a function gave is None in the others; one
    that another function gave before is numbered ("f_2"), which `shown` remembers by function and name."""
    columns = sorted({(call.index, column) for call in calls for column in call.columns})
    for key in columns:
        if key not in shown:
            shown[key] = numbered(key[1], shown.values())
    for call in calls:
        missing = [column for index, column in columns if index == call.index and column not in call.columns]
        nothing = [("log_extra", (column, [None] * len(call.rewards))) for column in missing]
        for key, (name, value) in [*call.logs, *nothing]:
            if (function := log[key]) is not None:
                function(shown[call.index, name] if key == "log_extra" else name, value)


def unique(names: Sequence[str]) -> list[str]:
    """Numbers names that occur again ("f", "f_2"), or their metrics would be one."""
    seen: list[str] = []
    for name in names:
        seen.append(numbered(name, seen))
    return seen


def numbered(name: str, taken: Collection[str]) -> str:
    """The first of "f", "f_2", "f_3", ... that is not taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


@torch.no_grad()
def _output(func: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What the function returns. `sys.exit` in it is an error like others: it would end the run without a word."""
    try:
        return read(func(**arguments))
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


def _first_error(attempts: list[Callable[[], Any]]) -> tuple[int, Exception] | None:
    for row, attempt in enumerate(attempts):
        try:
            attempt()
        except Exception as error:
            return row, error
    return None


async def _first_async_error(attempts: list[asyncio.Future]) -> tuple[int, Exception] | None:
    try:
        for row, attempt in enumerate(attempts):
            try:
                await attempt
            except Exception as error:
                return row, error
        return None
    finally:
        for attempt in attempts:
            attempt.cancel()


async def _within(timeout: float | None, func: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Any:
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            return read(await func(**kwargs))
    except (SystemExit, KeyboardInterrupt) as error:  # asyncio would end the event loop, for which calls wait
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RuntimeError(f"CancelledError: {error}") from error  # of something that the function awaited
    except TimeoutError as error:
        if not scope.expired():  # the function's own
            raise
        raise RewardTimeoutError(
            f"Async reward function {name!r} took longer than its time-out of {timeout:g} s and was cancelled. Raise "
            "reward_timeout, or make the function return in time."
        ) from error


def _snapshot(trainer_state: Any) -> Any:
    """The trainer's state by its attributes: as a TrainerState it would make every child import transformers. Of its
    logs the latest: all those of a long run take longer to send than the rewards."""
    if trainer_state is None:
        return None
    attributes = dict(vars(trainer_state))
    if "log_history" in attributes:
        attributes["log_history"] = attributes["log_history"][-LOGS_SENT:]
    return SimpleNamespace(**attributes)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes the place of log_extra and log_metric."""
