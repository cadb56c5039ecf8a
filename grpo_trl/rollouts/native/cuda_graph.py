"""Decoding steps captured as CUDA graphs: one launch instead of some dozens per layer.

A graph replays kernels on the addresses that it was captured with. So a step must find what it reads and writes at
fixed places (`cache`), and is captured for few sizes (`bucket`).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .attention import Shape

LENGTHS = 128

Step = Callable[[Shape], None]
Replay = Callable[[], None]


def bucket(shape: Shape, most: Shape) -> Shape:
    """The sizes that stand for `shape`: rows and groups up to the next power of two, own tokens up to the next
    multiple of 128, the rest as large as it gets. What is added is masked, or belongs to rows that nobody reads."""
    rows, groups = (1 << (number - 1).bit_length() for number in (shape.rows, shape.groups))
    length = -(-shape.length // LENGTHS) * LENGTHS
    return most._replace(rows=min(rows, most.rows), groups=min(groups, most.groups), length=min(length, most.length))


def capture(step: Replay) -> Replay:
    """`step` as a graph; it is recorded, not run."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: reward models may run in other threads meanwhile. Autocast's cache of cast weights would tie the
    # graph to copies that are freed with it
    with (
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
        torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False),
    ):
        step()
    return graph.replay


class GraphedSteps:
    """Runs steps, from the second time of a shape on as a graph. The first time, as it is, is the warm-up of kernels
    and libraries that capture asks for."""

    def __init__(self, capture: Callable[[Replay], Replay] = capture):
        self.capture = capture
        self.graphs: dict[Shape, Replay | None] = {}
        self.addresses: list[int] = []

    def sync(self, tensors: Iterable[Tensor]) -> None:
        """Forgets all graphs when what steps read or write is elsewhere than before: parameters that were replaced
        (an update in place does not move them), or the memory of the rollout."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self.addresses:
            self.graphs, self.addresses = {}, addresses

    def run(self, step: Step, shape: Shape) -> None:
        """One step."""
        if shape not in self.graphs:
            self.graphs[shape] = None
            step(shape)
            return
        replay = self.graphs[shape]
        if replay is None:
            replay = self.graphs[shape] = self.capture(lambda: step(shape))
        replay()
