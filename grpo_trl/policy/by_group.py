"""A reference on a device of its own scores each group of a rollout while others are still being sampled."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..batch import Group
from ..worker import Worker


class ScoredByGroup:
    """The log-probabilities of the groups of one rollout. A context: when it is left, what waits is dropped, and the
    thread has ended.

    Args:
        score: a group -> (G, T), T tokens of its longest completion. Called once per group, so that results are the
            same whether calls overlap or not.
        device: where it computes.
        overlap: call it on a thread as soon as a group is given; else when its result is asked for.
    """

    def __init__(self, score: Callable[[Group], Tensor], device: torch.device, *, overlap: bool):
        self.score = score
        self._worker = Worker(f"reference {device}", device) if overlap else None
        self._begun: dict[int, tuple[Group, Future]] = {}

    def __enter__(self) -> "ScoredByGroup":
        return self

    def __exit__(self, *error: Any) -> None:
        for _, future in self._begun.values():
            future.cancel()
        if self._worker is not None:
            self._worker.finish()
            self._worker.join()

    def start(self, group: Group) -> None:
        """Begins with a group that is complete. Raises what a call before has raised."""
        if self._worker is None:
            return
        self._begun[id(group)] = group, self._worker.submit(partial(self.score, group))
        for _, future in self._begun.values():
            if future.done():
                future.result()

    def per_token_logps(self, groups: Sequence[Group], width: int) -> Tensor:
        """(B, width), rows in the order of the groups, whether they were started or not; waits for those that are not
        done. Raises what a call has raised."""
        rows = torch.zeros(sum(map(len, groups)), width)
        for group, part in zip(groups, rows.split([*map(len, groups)]), strict=True):
            _, future = self._begun.get(id(group), (group, None))
            logps = self.score(group) if future is None else future.result()
            part[:, : logps.shape[1]] = logps
        return rows
