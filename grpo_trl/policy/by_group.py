"""A reference on a device of its own scores each group of a rollout while others are still being sampled."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from ..batch import Group
from ..worker import GRACE, Worker


class ScoredByGroup:
    """The log-probabilities of the groups of one rollout. A context: when it is left, what waits is dropped.

    Args:
        score: a group -> (G, T) fp32 on the CPU, T tokens of its longest completion. Called once per group, so that
            results are the same whether calls overlap or not.
        worker: the thread that makes the calls, which ends with the rollout. None: each is made when its result is
            asked for.
    """

    def __init__(self, score: Callable[[Group], Tensor], worker: Callable[[], Worker] | None):
        self.score, self.worker = score, worker
        self._begun: dict[int, tuple[Group, Worker, Future[Tensor]]] = {}

    def __enter__(self) -> "ScoredByGroup":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for _, _, future in self._begun.values():
            future.cancel()
        if error is not None:
            for worker in {worker for _, worker, _ in self._begun.values()}:
                worker.join(GRACE)

    def start(self, group: Group) -> None:
        """Begins with a group that is complete. Raises what a call before has raised."""
        if self.worker is None:
            return
        worker = self.worker()
        self._begun[id(group)] = group, worker, worker.submit(partial(self.score, group))
        for _, _, future in self._begun.values():
            if future.done():
                future.result()

    def per_token_logps(self, groups: Sequence[Group], width: int) -> Tensor:
        """(B, width) fp32 on the CPU, rows in the order of the groups, whether they were started or not; waits for
        those that are not done. Raises what a call has raised."""
        rows = torch.zeros(sum(map(len, groups)), width, dtype=torch.float32)
        for group, part in zip(groups, rows.split([*map(len, groups)]), strict=True):
            begun = self._begun.get(id(group))
            logps = self.score(group) if begun is None else begun[2].result()
            part[:, : logps.shape[1]] = logps
        return rows
