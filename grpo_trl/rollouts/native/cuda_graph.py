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

from ...token_limit import is_out_of_memory
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
            self._clean_up(graph, before)
            raise
        return graph.replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        """After a capture that failed, whose end torch breaks off half-way: its stream stays the current one and,
        before torch 2.14, memory is still taken for the graph, and the generator of random numbers waits for the end.
        """
        pool, self.pool = self.pool, None
        torch.cuda.set_stream(stream)
        if hasattr(graph, "capture_end_pre"):  # torch 2.14 or later
            return
        # private names: torch has no others for it
        with contextlib.suppress(RuntimeError):  # the capture's own end had done it
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        try:  # a capture that succeeds ends what the generator waits for
            with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                torch.zeros(1, device=stream.device)
        except RuntimeError:
            torch.cuda.set_stream(stream)


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
            step(shape)
            self.graphs[key] = None  # not before it has ended
            return
        replay = self.graphs[key]
        if replay is None:
            try:
                replay = self.graphs[key] = self.capture(lambda: step(shape))
                self.captured.append(step)
            except RuntimeError as error:  # nothing has been run
                self._give_up(key, error)
                replay = lambda: step(shape)  # noqa: E731
        replay()

    def _give_up(self, key: Any, error: RuntimeError) -> None:
        """Steps of this kind, for whose graph there is no memory; or all, of which some operation cannot be held."""
        if is_out_of_memory(error):
            if not self.without_room:
                logger.warning("Some decoding steps are not captured: there is no memory for their graphs.")
            self.without_room.add(key)
        else:
            logger.warning(f"Decoding steps of this model are not captured: {error}".splitlines()[0])
            self.possible = False
