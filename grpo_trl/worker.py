"""Threads beside the main one: frozen models and rewards work on groups while others are still being sampled."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import lru_cache
from typing import Any

import torch

GRACE = 5.0  # seconds that a thread gets to end when a rollout is broken off


class Worker:
    """A daemon thread that runs tasks in their order, without gradients and outside autocast.

    Args:
        name: of the thread.
        device: where the tasks compute, if one is known: on CUDA they have a stream of their own.
    """

    def __init__(self, name: str, device: torch.device | None = None):
        self.name = name
        self._dropped = False
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        # a new thread starts on the first GPU, not on that of its rank
        current = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, args=(device, current), name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], Any]) -> Future:
        """The task's result, or what it raises."""
        future: Future = Future()
        self._tasks.put((future, task))
        return future

    def finish(self) -> None:
        """Lets the thread end after the tasks that it was given."""
        self._tasks.put(None)

    def drop(self) -> None:
        """Cancels the tasks that have not begun."""
        self._dropped = True

    def join(self, timeout: float) -> bool:
        """Waits for the end of the thread for so many seconds. Returns whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self, device: torch.device | None, current: int | None) -> None:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            trouble: Exception | None = None
            try:
                stack.enter_context(_on_cuda(device, current))
            except Exception as error:  # every task's: the main thread waits for them
                trouble = error
            while (item := self._tasks.get()) is not None:
                future, task = item
                if self._dropped:
                    future.cancel()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    if trouble is not None:
                        raise trouble
                    future.set_result(task())
                except BaseException as error:  # the main thread raises it again
                    future.set_exception(error)
                del item, future, task  # a thread that waits keeps no rollout alive


@contextlib.contextmanager
def _on_cuda(device: torch.device | None, current: int | None) -> Iterator[None]:
    """On the GPU `current`, and on a stream of our own where `device` is a GPU."""
    with contextlib.ExitStack() as stack:
        if current is not None:
            stack.enter_context(torch.cuda.device(current))
        if device is not None and device.type == "cuda":
            stream = _stream(device)
            stream.wait_stream(torch.cuda.default_stream(device))  # on which the weights were written
            stack.enter_context(torch.cuda.stream(stream))
        yield


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One per device for as long as the process lives: the allocator keeps freed memory by stream."""
    return torch.cuda.Stream(device)
