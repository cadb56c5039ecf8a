"""Calls the reward functions on groups of completions, beside the sampling of further ones: `RewardScorer`."""

import asyncio
import math
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.utils import logging
from trl.trainer.utils import is_async_callable, start_event_loop_in_daemon

from ..batch import Group
from ..placement import input_device
from ..worker import GRACE, Worker
from .calls import Call, in_order, replay, unique
from .event_loop import end_event_loop
from .isolation import IsolatedFunction, RewardTimeoutError, in_words
from .math import AccuracyReward
from .model import RewardModel
from .registry import RewardFunction, reward_name
from .rows import rows_of
from .text import OnMessages

logger = logging.get_logger(__name__)

UNFINISHED = 32  # calls of one function that wait or run beside the main thread; then sampling waits


class RewardScorer:
    """Scores groups with F reward functions.

    Every function gets TRL's keyword arguments: `prompts`, `completions`, `completion_ids`, the columns of the dataset
    (one value per completion; None where a row of a mixed dataset lacks the column), `trainer_state`, `log_extra`,
    `log_metric`. Async functions run concurrently, beside the plain ones.

    Args:
        reward_funcs: F callables; `resolve_reward` makes them from names.
        names: what logs and errors call them; default `reward_name`, numbered where two are the same.
        weights: those of 0 belong to rewards that are logged only.
        timeout: seconds per call, None: no limit. Plain functions then run in a process of their own each, which is
            killed on expiry; there `trainer_state` is a copy. Async functions are cancelled at their next await.
            Reward models and `accuracy` (which has its own time-out) are exempt.
        per_group: call each function once per group instead of once for all. Those that say `by_row` (a row's
            reward depends on that row alone) are called per group in any case, and reward models once per `batch_size`
            rows.
        overlap: make calls beside the main thread, those for groups given to `start` at once. Functions that are
            called once for all, and those of `trl.rewards` (they use signals), stay in the main thread.

    `start` and `score` belong to one thread. After `score`, `wait_seconds` is how long that thread spent on scoring or
    waiting for it, `busy_seconds` how long the functions took, added up.

    Raises:
        ValueError: no function, a wrong number of names, or a function that cannot be sent to its own process.
    """

    def __init__(
        self,
        reward_funcs: Sequence[RewardFunction],
        names: Sequence[str] | None = None,
        *,
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
        per_group: bool = False,
        overlap: bool = False,
    ):
        if not reward_funcs:
            raise ValueError("No reward function was given; at least one is needed to score completions.")
        if names is not None and len(names) != len(reward_funcs):
            raise ValueError(f"{len(names)} names were given for {len(reward_funcs)} reward functions: {list(names)}.")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds, or None for no limit.")
        self.reward_funcs = list(reward_funcs)
        self.names = unique(names or [reward_name(func) for func in reward_funcs])
        for func, name in zip(self.reward_funcs, self.names, strict=True):
            if isinstance(func, RewardModel):
                func.__name__ = name  # what its own metrics are called: two models of one name would share them
        self.weights = torch.tensor(weights or [1.0] * len(self.names))
        self.timeout = timeout
        self.wait_seconds = self.busy_seconds = 0.0
        self._calls = [self._callable(func, name) for func, name in zip(self.reward_funcs, self.names, strict=True)]
        self._rows_per_call = [_rows_per_call(func, per_group) for func in self.reward_funcs]
        self._overlap = overlap
        self._columns: dict[tuple[int, str], str] = {}  # of `log_extra`, by function and name
        self._later: list[Group] = []  # given to `start`, without overlap
        self._waiting: list[list[Group]] = [[] for _ in self.names]  # per function, too few groups for a call
        self._begun: list[tuple[Call, Future | None]] = []  # None: left to the main thread
        self._workers: dict[Hashable, Worker] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # one for all calls: async clients stay valid
        self._end_loop: Callable[[], Any] = lambda: None
        self._is_scoring = False
        self._held_up = 0.0
        self._warned_all_none = False

    def start(self, group: Group, *, trainer_state: Any = None) -> None:
        """Begins to score a finished group, whose rewards a later `score` returns; where scoring is far behind, it
        waits.

        Raises:
            What `score` does, for this group or one before; the groups given so far are then forgotten.
        """
        if not self._overlap:
            self._later.append(group)
            return
        try:
            self._add(group, trainer_state)
        except BaseException:
            self.close()
            raise

    def score(
        self,
        groups: Sequence[Group],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """Rewards of all completions, (B, F) fp32 on the CPU, rows in the order of the groups; NaN: not applicable.

        Args:
            groups: any number, their `completions` filled; given to `start` before, or not.
            trainer_state: handed to the functions.
            log_extra, log_metric: called with what the functions log, in the order of the groups.

        Raises:
            RuntimeError: a function raised; names the function and the first row that fails alone.
            RewardTimeoutError (a TimeoutError): a function took longer than `timeout`.
            ValueError: a wrong count, NaN, infinity or a non-number; names function, row and value.
            In each case `close` was called.
        """
        if not groups:
            raise ValueError("There are no groups to score; give at least one.")
        self._refuse_within_itself()
        began, before, self._is_scoring = time.perf_counter(), self._held_up, True
        try:
            self._finish(groups, trainer_state)
        except BaseException:
            self.close()
            raise
        finally:
            self._is_scoring = False
        order = {id(group): place for place, group in enumerate(groups)}
        calls = [call for call, _ in self._begun if any(id(group) in order for group in call.groups)]
        calls.sort(key=lambda call: (min(order.get(id(group), len(order)) for group in call.groups), call.index))
        self._drop()
        replay(calls, self._columns, log_extra=log_extra, log_metric=log_metric)
        rewards_per_func = in_order(calls, groups, len(self.names))
        self._warn_if_all_none(rewards_per_func, groups)
        self.busy_seconds = sum(call.seconds for call in calls)
        self.wait_seconds, self._held_up = before + time.perf_counter() - began, 0.0
        return rewards_per_func

    def forget(self) -> None:
        """Drops the groups that were given to `start`. Threads end after the calls that they are in, and after what
        else they were given (`worker_on`).

        Raises:
            RuntimeError: a reward function called this.
        """
        self._refuse_within_itself()
        self._drop()

    def _refuse_within_itself(self) -> None:
        if self._is_scoring:
            raise RuntimeError(
                "A reward function cannot sample, score or evaluate with the trainer that is calling it; make "
                "completions in GRPOTrainer.rollout, or score with models and functions of your own."
            )

    def _drop(self) -> None:
        self._cancel()
        for worker in self._workers.values():
            worker.finish()
        self._begun, self._later, self._waiting, self._workers = [], [], [[] for _ in self.names], {}

    def close(self) -> None:
        """Ends the functions' processes, what runs in threads, and the event loop; at interpreter exit processes end
        by themselves. Scoring again restarts."""
        workers = list(self._workers.values())
        for worker in workers:
            worker.drop()
        self._drop()
        for call, name in zip(self._calls, self.names, strict=True):
            if not _has_own_process(call):
                self._close(call, name)
        give_up = time.perf_counter() + GRACE
        while True:
            running = [worker for worker in workers if not worker.join(0.02)]
            for call in filter(_has_own_process, self._calls):
                call.close()  # again: a thread that is between two rows starts a process for the next
            if not running or time.perf_counter() > give_up:
                break
        for worker in running:
            logger.warning(
                f"The thread {worker.name!r} is still in a call, which cannot be ended: it runs on until it "
                "returns or the program ends. With reward_timeout a Python reward function is killed."
            )
        self._end_loop()
        self._loop = None

    def _close(self, call: Any, name: str) -> None:
        """What a user's function brings; no error of it may take the place of that for which all is closed."""
        close = getattr(call, "close", None)
        if not callable(close):
            return
        try:
            if asyncio.iscoroutine(closing := close()):
                asyncio.run_coroutine_threadsafe(closing, self._event_loop()).result(GRACE)
        except Exception as error:
            logger.warning(f"close() of reward function {name!r} failed: {in_words(error)}")

    def worker_on(self, device: torch.device) -> Worker:
        """The thread of the frozen models on a device, for this rollout."""
        return self._worker_of(device, f"models on {device}", device)

    def _callable(self, func: RewardFunction, name: str) -> RewardFunction:
        if self.timeout is None or _stays_in_process(func) or is_async_callable(func):
            return func
        return IsolatedFunction(func, name=name, timeout=self.timeout)

    def _add(self, group: Group, trainer_state: Any) -> None:
        """Begins the calls for which there are enough groups with this one."""
        for index, waiting in enumerate(self._waiting):
            waiting.append(group)
            if len(group) * (len(waiting) + 1) > self._rows_per_call[index]:
                self._begin(index, waiting, trainer_state)
                self._waiting[index] = []
        self._raise_failure()

    def _begin(self, index: int, groups: list[Group], trainer_state: Any) -> None:
        """One call: on the event loop, in a thread, or left to the main thread."""
        call = Call(self._calls[index], index, self.names[index], groups, trainer_state)
        future = None
        if is_async_callable(call.func):
            self._hold_up(index)
            future = asyncio.run_coroutine_threadsafe(call.run_async(self.timeout), self._event_loop())
        elif (worker := self._worker(index)) is not None:
            self._hold_up(index)
            future = worker.submit(call.run)
        self._begun.append((call, future))

    def _hold_up(self, index: int) -> None:
        """Waits while too many calls of a function are unfinished."""
        began = time.perf_counter()
        while True:
            begun = [(call, f) for call, f in self._begun if call.index == index and f is not None and not f.done()]
            if len(begun) < UNFINISHED:
                break
            self._wait(begun, FIRST_COMPLETED)
        self._held_up += time.perf_counter() - began

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            thread, self._loop, ready = start_event_loop_in_daemon(name="rewards")
            ready.wait()
            self._end_loop = weakref.finalize(self, end_event_loop, thread, self._loop, GRACE)
        return self._loop

    def _worker(self, index: int) -> Worker | None:
        """The thread of a function, of all models on one device; None: the main thread."""
        func, call = self.reward_funcs[index], self._calls[index]
        stays = self._rows_per_call[index] == math.inf or isinstance(func, OnMessages)
        if not self._overlap or (stays and not isinstance(call, IsolatedFunction)):
            return None
        if isinstance(func, RewardModel):
            return self.worker_on(input_device(func.model))
        # one thread for the methods of one object too
        return self._worker_of(id(getattr(func, "__self__", func)), f"reward {self.names[index]}")

    def _worker_of(self, key: Hashable, name: str, device: torch.device | None = None) -> Worker:
        if key not in self._workers:
            self._workers[key] = Worker(name, device)
        return self._workers[key]

    def _finish(self, groups: Sequence[Group], trainer_state: Any) -> None:
        """Makes the calls that are left, and waits for those that run."""
        given = {id(group) for waiting in self._waiting for group in waiting}
        given |= {id(group) for call, _ in self._begun for group in call.groups}
        given |= {id(group) for group in self._later}
        for group in [*self._later, *(group for group in groups if id(group) not in given)]:
            self._add(group, trainer_state)
        for index, waiting in enumerate(self._waiting):
            given = {id(group) for group in waiting}
            if rest := [group for group in groups if id(group) in given]:
                self._begin(index, rest, trainer_state)
        for call, future in self._begun:
            if future is None:
                self._raise_failure()
                call.run()
        self._wait(self._begun, FIRST_EXCEPTION)
        self._raise_failure()

    def _wait(self, begun: Sequence[tuple[Call, Future | None]], until: str) -> None:
        """For calls beside the main thread. Async ones time out where they run, all at once and row by row when they
        fail; but not one that blocks the event loop, so they do here after that."""
        calls = {future: call for call, future in begun if future is not None}
        most = None if self.timeout is None else 2 * self.timeout + GRACE
        while True:
            began = time.perf_counter()
            _, unfinished = wait(calls, most, until)
            if most is None or time.perf_counter() - began < most:
                return
            for call in (calls[future] for future in unfinished):
                if is_async_callable(call.func):
                    raise RewardTimeoutError(
                        f"Async reward function {call.name!r} was not back after {most:g} s, though its time-out is "
                        f"{self.timeout:g} s: it or another one blocks the event loop (time.sleep, a client that is "
                        "not async). Await what takes time, or hand it to asyncio.to_thread."
                    )

    def _raise_failure(self) -> None:
        for _, future in self._begun:
            if future is not None and future.done():
                future.result()

    def _cancel(self) -> None:
        for call, future in self._begun:
            call.cancelled = True
            if future is not None:
                future.cancel()

    def _warn_if_all_none(self, rewards_per_func: Tensor, groups: Sequence[Group]) -> None:
        all_none = rewards_per_func[:, self.weights != 0].isnan().all(1)
        if self._warned_all_none or not (self.weights.any() and all_none.any()):
            return
        self._warned_all_none = True
        counted = [name for name, counts in zip(self.names, self.weights.tolist(), strict=True) if counts]
        row = int(all_none.nonzero()[0])
        logger.warning(
            f"All reward functions ({', '.join(counted)}) returned None for the following row:\n"
            f"{ {key: values[row] for key, values in rows_of(groups).items()} }\n"
            "Please ensure that at least one reward function returns a valid reward. Such rows have no advantage; "
            "this is said once."
        )


def _rows_per_call(func: RewardFunction, per_group: bool) -> float:
    """Completions of a call at most; a group is never split."""
    if isinstance(func, RewardModel):
        return func.batch_size
    return 1 if per_group or getattr(func, "by_row", False) is True else math.inf


def _has_own_process(call: Any) -> TypeGuard[IsolatedFunction | AccuracyReward]:
    """Ended by `close`, and started again by the next call."""
    return isinstance(call, (IsolatedFunction, AccuracyReward))


def _stays_in_process(func: RewardFunction) -> bool:
    """Models, and rewards that bring a process of their own."""
    return isinstance(func, nn.Module) or getattr(func, "in_process", False)
