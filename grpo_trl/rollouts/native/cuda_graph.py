"""Decoding steps captured as CUDA graphs: one launch instead of some dozens per layer.

A graph replays kernels on the addresses that it was captured with. So a step must find what it reads and writes at
fixed places (`cache`), and is captured for few sizes (`bucket`).
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .attention import Shape

logger = logging.get_logger(__name__)

LENGTHS = 128

Step = Callable[[Shape], None]
Replay = Callable[[], None]


def bucket(shape: Shape, most: Shape, *, by_length: bool = True) -> Shape:
    """The sizes that stand for `shape`: rows and groups up to the next power of two, own tokens up to the next
    multiple of 128 (unless what runs does not depend on it), the rest as large as it gets. What is added is masked, or
    belongs to rows that nobody reads."""
    rows, groups = (1 << (number - 1).bit_length() for number in (shape.rows, shape.groups))
    length = -(-shape.length // LENGTHS) * LENGTHS if by_length else most.length
    return most._replace(rows=min(rows, most.rows), groups=min(groups, most.groups), length=min(length, most.length))


class Capture:
    """Makes graphs of steps, which are recorded and not run. What a step computes in between is read by nobody after
    it, so all graphs keep it in the same memory."""

    def __init__(self):
        self.pool: Any = None  # of the first graph; it ends with the last

    def __call__(self, step: Replay) -> Replay:
        """Raises RuntimeError when the step does something that a graph cannot hold, as waiting for the device."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # thread_local: frozen models may run in other threads meanwhile. Autocast's cache of cast weights would tie
        # the graph to copies that are freed with it
        try:
            with (
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
                torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False),
            ):
                step()
        except RuntimeError:
            self._clean_up(before)
            raise
        return graph.replay

    def _clean_up(self, stream: torch.cuda.Stream) -> None:
        """After a capture that failed, whose end torch breaks off half-way: its stream stays the current one, memory
        is still taken for the graph, and (torch 2.11) the generator of random numbers waits for the end."""
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # it was ended
            torch._C._cuda_endAllocateToPool(stream.device_index, self.pool)  # private; no other way to say so
        self.pool = None
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=stream.device)  # one that succeeds ends what the generator waits for


class GraphedSteps:
    """Runs steps, from the second time of a shape on as a graph. The first time, as it is, is the warm-up of kernels
    and libraries that capture asks for."""

    def __init__(self, new_capture: Callable[[], Callable[[Replay], Replay]] = Capture):
        self.new_capture = new_capture
        self.capture = new_capture()
        self.graphs: dict[Any, Replay | None] = {}
        self.captured: list[Step] = []  # kept alive: graphs keep addresses of what steps read, not the tensors
        self.made_for: Any = None
        self.possible = True
        self.without_room: set[Any] = set()  # for whose graphs memory ran out

    def sync(self, tensors: Iterable[Tensor], modes: Any = None) -> None:
        """Forgets all graphs when what steps read or write is elsewhere than before: parameters that were replaced
        (an update in place does not move them), or the memory of the rollout; or when other modules run (`modes`)."""
        made_for = [tensor.data_ptr() for tensor in tensors], modes
        if made_for != self.made_for:
            self.forget()
            self.made_for = made_for

    def forget(self) -> None:
        """Drops all graphs, and with them what keeps the memory that they were made for."""
        self.graphs, self.captured, self.made_for, self.capture = {}, [], None, self.new_capture()
        self.without_room = set()

    def run(self, step: Step, shape: Shape, sampling: Hashable = None) -> None:
        """One step; `sampling` is what it depends on besides its sizes."""
        key = shape, sampling
        if not self.possible or key not in self.graphs or key in self.without_room:
            self.graphs[key] = None
            step(shape)
            return
        replay = self.graphs[key]
        if replay is None:
            try:
                replay = self.graphs[key] = self.capture(lambda: step(shape))
                self.captured.append(step)
            except torch.OutOfMemoryError:  # nothing has been run; smaller ones may have room
                if not self.without_room:
                    logger.warning("Some decoding steps are not captured: there is no memory for their graphs.")
                self.without_room.add(key)
                replay = lambda: step(shape)  # noqa: E731
            except RuntimeError as error:
                logger.warning(f"Decoding steps of this model are not captured: {error}".splitlines()[0])
                self.possible, replay = False, lambda: step(shape)
        replay()
