"""Decoding steps captured as CUDA graphs: one launch instead of some dozens per layer.

A graph replays kernels on the addresses that it was captured with. So a step must find what it reads and writes at
fixed places (`cache`), and is captured for few sizes (`bucket`).
"""

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


def bucket(shape: Shape, most: Shape) -> Shape:
    """The sizes that stand for `shape`: rows and groups up to the next power of two, own tokens up to the next
    multiple of 128, the rest as large as it gets. What is added is masked, or belongs to rows that nobody reads."""
    rows, groups = (1 << (number - 1).bit_length() for number in (shape.rows, shape.groups))
    length = -(-shape.length // LENGTHS) * LENGTHS
    return most._replace(rows=min(rows, most.rows), groups=min(groups, most.groups), length=min(length, most.length))


class Capture:
    """Makes graphs of steps, which are recorded and not run. What a step computes in between is read by nobody after
    it, so all graphs keep it in the same memory."""

    def __init__(self):
        self.pool: Any = None  # of the first graph; it ends with the last

    def __call__(self, step: Replay) -> Replay:
        """Raises RuntimeError when the step does something that a graph cannot hold, as waiting for the device."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: frozen models may run in other threads meanwhile. Autocast's cache of cast weights would tie
        # the graph to copies that are freed with it
        with (
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False),
        ):
            step()
        self.pool = self.pool or graph.pool()
        return graph.replay


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

    def run(self, step: Step, shape: Shape, sampling: Hashable = None) -> None:
        """One step; `sampling` is what it depends on besides its sizes."""
        key = shape, sampling
        if not self.possible or key not in self.graphs:
            self.graphs[key] = None
            step(shape)
            return
        replay = self.graphs[key]
        if replay is None:
            try:
                replay = self.graphs[key] = self.capture(lambda: step(shape))
                self.captured.append(step)
            except RuntimeError as error:  # nothing has been run
                logger.warning(f"Decoding steps of this model are not captured: {error}".splitlines()[0])
                self.possible, replay = False, lambda: step(shape)
        replay()
