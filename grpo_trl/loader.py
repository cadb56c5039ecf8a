"""Prompts in, micro-batches out: the order of the data, the rollout buffer, and the position in both.

A *collection* is what is sampled at once: `steps_per_generation` micro-batches on each rank, whole groups, whole
optimizer steps. It is passed over `num_iterations` times. An epoch is whole collections: the last one is completed
with the first prompts of the next epoch's order. Everything follows from one number, the micro-batches yielded so far;
where it is not known beforehand which prompts a collection takes, from a second one, the prompts drawn.
"""

import random
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import count, islice
from math import ceil
from typing import Any, Protocol

import torch
from accelerate.logging import get_logger
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from .algorithm import token_weights
from .batch import Prompt, RolloutBatch
from .config import GRPOConfig
from .fingerprint import data_fingerprint
from .manifest import ResumeError
from .prompt_memory import PromptMemory

logger = get_logger(__name__)  # of accelerate: speaks on the main process only

# with the number of ranks and of prompts, what the loader's position means depends on these
LAYOUT_FIELDS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "seed",
    "data_seed",
    "shuffle_dataset",
    "dynamic_sampling",
)
REASONS = {
    "ranks": "Each rank holds its own part of a rollout and its own random state.",
    "num_generations": "The rollout that was saved is of groups of the former size.",
    "data": "data is a hash of the rows: they are not those that the run began with.",
}


class PromptSource(Protocol):
    """Where draws come from. `num_prompts` is the length of an epoch, `fingerprint` tells whether the data are the
    same; both are None for a stream."""

    num_prompts: int | None
    fingerprint: str | None

    def draw(self, epoch: int, position: int) -> dict[str, Any]:
        """The example at this position of this epoch's order; positions past its end run on into the next orders."""
        ...


class IndexedPrompts:
    """A map-style dataset in a new order each epoch, a function of (seed, epoch) alone."""

    def __init__(self, dataset: Any, *, seed: int, shuffle: bool):
        self.dataset = dataset
        self.num_prompts: int | None = len(dataset)
        self.fingerprint: str | None = data_fingerprint(dataset)
        self._order = lru_cache(maxsize=2)(partial(epoch_order, len(dataset), seed, shuffle=shuffle))

    def draw(self, epoch: int, position: int) -> dict[str, Any]:
        """See `PromptSource`."""
        laps, index = divmod(position, len(self.dataset))
        return self.dataset[int(self._order(epoch + laps)[index])]


class StreamedPrompts:
    """A streaming dataset, read front to back, shuffled in a buffer, and over again when it ends.

    Every rank reads the whole stream and keeps its own draws. Positions must not decrease.
    """

    num_prompts: int | None = None
    fingerprint: str | None = None

    def __init__(self, dataset: IterableDataset, *, seed: int, shuffle: bool):
        self.dataset = dataset.shuffle(seed=seed) if shuffle else dataset
        self._stream = self._forever()
        self._next = 0

    def draw(self, epoch: int, position: int) -> dict[str, Any]:
        """See `PromptSource`."""
        skipped = position - self._next
        self._next = position + 1
        return next(islice(self._stream, skipped, None))

    def _forever(self) -> Iterator[dict[str, Any]]:
        for lap in count():
            self.dataset.set_epoch(lap)
            empty = True
            for example in self.dataset:
                empty = False
                yield example
            if empty:
                raise ValueError("train_dataset, a stream, yielded no example; check its files, split and filters.")


class RolloutLoader:
    """Yields `RolloutBatch` micro-batches; `transformers.Trainer` treats it as a data loader.

    Args:
        source: the prompts.
        encode: (example, draw number) -> `Prompt`.
        collect: this rank's prompts -> `RolloutBatch`; called once per collection, at the same time on every rank.
            With dynamic sampling it is given `take` instead, to draw as many as it needs.
        args: batch sizes, seed, and the averaging rule.
        rank, world_size, all_reduce: of the training processes; `all_reduce` sums a tensor over them.
        memory: says which prompts to pass over. None: none.
    """

    def __init__(
        self,
        source: PromptSource,
        encode: Callable[[dict[str, Any], int], Prompt],
        collect: Callable[[Any], RolloutBatch],
        args: GRPOConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
        memory: PromptMemory | None = None,
    ):
        self.source, self.encode, self.collect, self.args = source, encode, collect, args
        self.rank, self.world_size, self.all_reduce = rank, world_size, all_reduce
        self.memory = memory if memory is not None and memory.can_skip else None
        self.micro_batches_per_step = args.gradient_accumulation_steps
        self.micro_batches_per_pass = args.steps_per_generation
        self.micro_batches_per_collection = args.steps_per_generation * args.num_iterations
        self.prompts_per_collection = args.generation_batch_size // args.num_generations
        self.position = 0  # micro-batches yielded, over all epochs
        self.drawn = 0  # prompts that `take` gave out or passed over, over all ranks
        self.passed_over = 0  # of these, those that the last `take` passed over
        self.skips_update = False  # whether nothing counts in the current optimizer step, on any rank
        self._buffer: tuple[int, RolloutBatch] | None = None  # collection number and this rank's rows
        self._window: tuple[int, RolloutBatch] | None = None  # number and rows of the current optimizer step

    @property
    def dataset(self) -> TorchDataset:
        """What transformers counts as the examples of an epoch."""
        return _Length(self.source.num_prompts)

    @property
    def collections_per_epoch(self) -> int:
        """Raises TypeError for a stream, as a data loader without a length does."""
        if self.source.num_prompts is None:
            raise TypeError("a stream of prompts has no length; set max_steps.")
        return ceil(self.source.num_prompts / self.prompts_per_collection)

    def __len__(self) -> int:
        return self.collections_per_epoch * self.micro_batches_per_collection

    @property
    def collection(self) -> int:
        """Number of the collection that the next micro-batch is of, over all epochs."""
        return self.position // self.micro_batches_per_collection

    @property
    def is_fresh(self) -> bool:
        """Whether what was yielded last is of the first optimizer step after its rollout: the policy still is the one
        that sampled it."""
        return (self.position - 1) % self.micro_batches_per_collection < self.micro_batches_per_step

    @property
    def epoch_is_over(self) -> bool:
        """Whether what was yielded last is the end of an epoch; a stream has none."""
        return self.source.num_prompts is not None and self.position % len(self) == 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch. An epoch that was stopped early is not taken up again."""
        if self.source.num_prompts is not None:
            self.position = max(self.position, epoch * len(self))

    def __iter__(self) -> Iterator[RolloutBatch]:
        # The Trainer takes the last micro-batch of an epoch without exhausting the iterator, so nothing may depend
        # on code after the last yield.
        end = None if self.source.num_prompts is None else (self.position // len(self) + 1) * len(self)
        while end is None or self.position < end:
            batch = self._micro_batch()
            self.position += 1
            yield batch
            del batch  # else its storage lives on while the next collection is sampled

    def prompts(self, collection: int) -> list[Prompt]:
        """This rank's prompts of a collection. Draws are dealt out in turn, so each optimizer step is made of the same
        draws for every number of ranks."""
        if self.memory is not None:
            return self.take(self.prompts_per_collection)
        epoch, start = 0, collection * self.prompts_per_collection
        if self.source.num_prompts is not None:
            epoch, within = divmod(collection, self.collections_per_epoch)
            start = within * self.prompts_per_collection
        prompts = []
        for i in range(self.rank, self.prompts_per_collection, self.world_size):
            example = self.source.draw(epoch, start + i)
            prompts.append(self.encode(example, collection * self.prompts_per_collection + i))
        return prompts

    def take(self, count: int) -> list[Prompt]:
        """This rank's share of the next `count` prompts, a multiple of the number of ranks. The epochs' orders run on
        into each other. A prompt that the memory passes over leaves a gap in the draw numbers."""
        if self.memory is not None:
            return self._take_unskipped(count, self.memory)[self.rank :: self.world_size]
        start, self.drawn = self.drawn, self.drawn + count
        return [
            self.encode(self.source.draw(0, draw), draw)
            for draw in range(start + self.rank, start + count, self.world_size)
        ]

    def _take_unskipped(self, count: int, memory: PromptMemory) -> list[Prompt]:
        """The next `count` prompts of all ranks, each of which reads all of them, that the memory does not skip.

        After two laps (in a stream: two prompts passed over for each one skipped at present) each other prompt has
        come twice, or there is none, and the rest are taken as they come.
        """
        rows, start = self.source.num_prompts, self.drawn
        taken: list[Prompt] = []
        self.passed_over = 0
        while len(taken) < count:
            prompt = self.encode(self.source.draw(0, self.drawn), self.drawn)
            patient = self.drawn - start < 2 * rows if rows else self.passed_over < 2 * memory.num_skipped
            self.drawn += 1
            if not memory.skips(prompt):
                taken.append(prompt)
            elif patient:
                self.passed_over += 1
            else:
                logger.warning_once(
                    "Too few prompts are left that skip_solved_after and skip_hopeless_after do not skip: all of "
                    "these were passed over twice within one rollout, so the rest of it is drawn as it comes. Look at "
                    "prompt_memory.parquet; change these options or eval_pass_threshold, or end the run."
                )
                taken.append(prompt)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Position and buffer as of the last micro-batch yielded. Tensors under "buffer", numbers elsewhere."""
        state: dict[str, Any] = {"position": self.position, "drawn": self.drawn, "layout": self._layout()}
        state |= {"collection": None, "buffer": {}}
        if self._buffer is not None and self.position % self.micro_batches_per_collection:
            state["collection"], batch = self._buffer[0], self._buffer[1]
            state["buffer"] = batch.tensors()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, without sampling the buffered collection again. Raises ValueError as
        `check_layout` does."""
        self.check_layout(state["layout"])
        self.position, self.drawn = state["position"], state["drawn"]
        self._buffer = self._window = None
        if state["collection"] is not None:
            self._buffer = (state["collection"], RolloutBatch(**state["buffer"]).to(self.args.device))

    def check_layout(self, then: dict[str, Any]) -> None:
        """Raises ResumeError for a state that was taken with other batch sizes, ranks, seed or data, so that its
        position means something else here."""
        now = self._layout()
        changed = [f"{name}: {then[name]} then, {now[name]} now" for name in now if then[name] != now[name]]
        reasons = "".join(f"{reason} " for name, reason in REASONS.items() if then[name] != now[name])
        if changed:
            raise ResumeError(
                "This run cannot continue from the checkpoint, because the position in its data means something else "
                f"now: {'; '.join(changed)}. {reasons}Restore these values, or start a new run from its weights "
                "(model_name_or_path; in Python model=)."
            )

    def _layout(self) -> dict[str, Any]:
        """What the meaning of `position` depends on."""
        layout = {name: getattr(self.args, name) for name in LAYOUT_FIELDS}
        source = self.source
        layout |= {"ranks": self.world_size, "prompts": source.num_prompts, "data": source.fingerprint}
        return layout | {"skip_solved_after or skip_hopeless_after set": self.memory is not None}

    def _micro_batch(self) -> RolloutBatch:
        step, micro_batch = divmod(self.position, self.micro_batches_per_step)
        if self._window is None or self._window[0] != step:
            self._window = (step, self._optimizer_step())
        size = self.args.per_device_train_batch_size
        return self._window[1].rows(slice(micro_batch * size, (micro_batch + 1) * size))

    def _optimizer_step(self) -> RolloutBatch:
        """This rank's rows of the optimizer step that begins at `position`, with their weights."""
        collection, offset = divmod(self.position, self.micro_batches_per_collection)
        if self._buffer is None or self._buffer[0] != collection:
            self._buffer = self._window = None  # free the old collection before the next one is sampled
            prompts = self.take if self.args.dynamic_sampling else self.prompts(collection)
            self._buffer = (collection, self.collect(prompts))
        iteration, micro_batch = divmod(offset, self.micro_batches_per_pass)
        order = self._order(collection, iteration)
        rows = self._buffer[1].rows(order[micro_batch // self.micro_batches_per_step])
        if self.args.dynamic_sampling:
            self.skips_update = not self.all_reduce(rows.loss_mask.sum())
        rows.token_weights = self._weights(rows, self.args.token_weighting)
        if self.args.entropy_coef:
            rows.mean_weights = self._weights(rows, "token")
        return rows

    def _weights(self, rows: RolloutBatch, token_weighting: str) -> Tensor:
        return token_weights(
            rows.loss_mask,
            token_weighting,
            max_completion_length=self.args.max_completion_length,
            world_size=self.world_size,
            all_reduce=self.all_reduce,
        )

    def _order(self, collection: int, iteration: int) -> list[list[int]]:
        """Row numbers of each optimizer step of a pass.

        Where a step is whole groups, passes after the first reshuffle them over the optimizer steps. Each slot of a
        step is permuted over the steps by itself, so a group stays on its rank and the groups of a step are the same
        for any number of ranks.
        """
        args = self.args
        num_steps = self.micro_batches_per_pass // self.micro_batches_per_step
        rows_per_step = args.per_device_train_batch_size * self.micro_batches_per_step
        whole_groups = rows_per_step % args.num_generations == 0
        piece = args.num_generations if whole_groups else rows_per_step
        order: list[list[int]] = [[] for _ in range(num_steps)]
        for slot in range(rows_per_step // piece):
            steps = list(range(num_steps))
            if iteration and whole_groups:
                random.Random(f"{args.seed}/{collection}/{iteration}/{slot * self.world_size + self.rank}").shuffle(
                    steps
                )
            for target, origin in enumerate(steps):
                start = origin * rows_per_step + slot * piece
                order[target].extend(range(start, start + piece))
        return order


class _Length(TorchDataset):
    """Stands for the examples when transformers asks how many there are."""

    def __init__(self, length: int | None):
        self.length = length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("a stream of prompts has no length")
        return self.length


def epoch_order(num_prompts: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of the prompts in an epoch: a permutation of range(num_prompts) that depends on (seed, epoch) only."""
    if not shuffle:
        return list(range(num_prompts))
    # a plain seed + epoch would give (42, 1) and (43, 0) the same order
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(num_prompts, generator=generator).tolist()
