"""The order of the data, the rollout buffer and the position in both. Rollouts are made up, all else is real."""

import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import pytest
import torch
from datasets import Dataset, IterableDataset

from grpo_trl import checkpoint
from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.config import GRPOConfig
from grpo_trl.fingerprint import data_fingerprint
from grpo_trl.loader import IndexedPrompts, RolloutLoader, StreamedPrompts, epoch_order

G = 4


class Rollouts:
    """Stands for the trainer: makes groups whose every number tells draw and row, and keeps what it was asked for."""

    def __init__(self):
        self.collections: list[list[Prompt]] = []

    @property
    def draws(self) -> list[list[int]]:
        return [[prompt.draw for prompt in prompts] for prompts in self.collections]

    @property
    def examples(self) -> list[list[int]]:
        return [[prompt.example["id"] for prompt in prompts] for prompts in self.collections]

    def encode(self, example, draw):
        return Prompt([example["id"] + 1] * (1 + example["id"] % 3), example, draw)

    def collect(self, prompts):
        self.collections.append(prompts)
        batch = RolloutBatch.from_groups(
            [
                Group(prompt, [[code(prompt.draw, g)] * (1 + (prompt.draw + 3 * g) % 5) for g in range(G)], [True] * G)
                for prompt in prompts
            ],
            pad_token_id=0,
        )
        # fields that belong to the same row, with as many dimensions as real ones
        batch.advantages = batch.completion_ids[:, 0].float()
        batch.old_per_token_logps = -batch.completion_ids.float()
        return batch


def code(draw, g):
    """The number that completion g of a draw is made of; 0 is padding."""
    return draw * G + g + 1


def flat(lists):
    return list(chain.from_iterable(lists))


def numbers(batch):
    """(draw, g) of each row, after checking that the fields of a row belong together."""
    first = batch.completion_ids[:, 0]
    assert torch.equal(batch.advantages, first.float())
    assert torch.equal(batch.old_per_token_logps, -batch.completion_ids.float())
    assert torch.equal(batch.completion_ids, first[:, None] * batch.completion_mask)
    return [divmod(int(number) - 1, G) for number in first]


def dataset(size):
    return Dataset.from_dict({"id": list(range(size))})


def config(**options):
    defaults = {"per_device_train_batch_size": 8, "num_generations": G, "num_iterations": 1, "seed": 5}
    return GRPOConfig("unused", use_cpu=True, report_to="none", **{**defaults, **options})


def loader(
    data=16, *, rank=0, world_size=1, all_reduce=lambda x: x, rollouts=None, shuffle=True, memory=None, **options
):
    """`per_device_train_batch_size` is that of one rank out of `world_size`."""
    args = config(**options)
    args.generation_batch_size *= world_size  # this process has one rank, of which it plays another
    prompts = StreamedPrompts if isinstance(data, IterableDataset) else IndexedPrompts
    data = dataset(data) if isinstance(data, int) else data
    rollouts = rollouts or Rollouts()
    source = prompts(data, seed=args.seed, shuffle=shuffle)
    made = RolloutLoader(
        source, rollouts.encode, rollouts.collect, args, rank=rank, world_size=world_size, all_reduce=all_reduce,
        memory=memory,
    )  # fmt: skip
    return made, rollouts


def epochs(made, count=1, first=0):
    """The micro-batches of some epochs, taken as `transformers.Trainer` takes them: no iterator is ever exhausted."""
    for epoch in range(first, first + count):
        made.set_epoch(epoch)
        remaining = len(made) - made.position % len(made)
        yield from islice(iter(made), remaining)


def steps(batches, accumulation):
    """Micro-batches -> the (draw, g) of each optimizer step."""
    rows = [numbers(batch) for batch in batches]
    return [flat(rows[i : i + accumulation]) for i in range(0, len(rows), accumulation)]


def assert_same(first, second):
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


# ---- Ranks ----

# 16 groups per collection, in 4 optimizer steps of 4 groups, passed over 3 times; an epoch is 3 collections
FOUR_STEPS = {"gradient_accumulation_steps": 2, "steps_per_generation": 8, "num_iterations": 3}
SPLITS = [(1, 8), (2, 4), (4, 2)]


def all_ranks(world_size, per_device, count=1, data=40, **options):
    """What each rank yields and collects over some epochs: [(micro-batches, rollouts)]."""
    result = []
    for rank in range(world_size):
        made, rollouts = loader(
            data, rank=rank, world_size=world_size, per_device_train_batch_size=per_device, **options
        )
        result.append((list(epochs(made, count)), rollouts))
    return result


@pytest.mark.parametrize(("world_size", "per_device"), SPLITS)
def test_draws_are_dealt_out_in_turn(world_size, per_device):
    ranks = all_ranks(world_size, per_device, count=2, **FOUR_STEPS)
    alone = all_ranks(1, 8, count=2, **FOUR_STEPS)[0][1]
    assert alone.draws == [list(range(16 * c, 16 * c + 16)) for c in range(6)]  # every draw has a number of its own
    for collection in range(6):
        for rank, (_, rollouts) in enumerate(ranks):
            # the same prompts under the same numbers as on one rank, every `world_size`-th of them
            assert rollouts.draws[collection] == alone.draws[collection][rank::world_size]
            assert rollouts.examples[collection] == alone.examples[collection][rank::world_size]


@pytest.mark.parametrize(("world_size", "per_device"), SPLITS)
@pytest.mark.parametrize(
    "options", [FOUR_STEPS, {**FOUR_STEPS, "gradient_accumulation_steps": 8}, {"gradient_accumulation_steps": 2}]
)
def test_an_optimizer_step_is_the_same_groups_on_any_number_of_ranks(world_size, per_device, options):
    accumulation = options["gradient_accumulation_steps"]
    (alone, _) = all_ranks(1, 8, **options)[0]
    expected = [set(step) for step in steps(alone, accumulation)]
    ranks = [steps(batches, accumulation) for batches, _ in all_ranks(world_size, per_device, **options)]
    assert [len(rank) for rank in ranks] == [len(expected)] * world_size
    for number, step in enumerate(zip(*ranks, strict=True)):
        rows = flat(step)
        assert set(rows) == expected[number]
        assert len(rows) == len(expected[number])  # none twice
        for rank in step:  # whole groups, contiguous, in the order in which they were sampled
            assert rank == [(draw, g) for draw in dict.fromkeys(draw for draw, _ in rank) for g in range(G)]


def test_later_passes_reshuffle_groups_over_the_steps():
    batches, _ = all_ranks(1, 8, **FOUR_STEPS)[0]
    passes = [[{draw for draw, _ in step} for step in steps(batches, 2)[4 * i : 4 * i + 4]] for i in range(9)]
    for i, groups in enumerate(passes):
        collection = i // 3
        assert [len(step) for step in groups] == [4] * 4
        # every group exactly once in a pass, and of this collection
        assert sorted(draw for step in groups for draw in step) == list(range(16 * collection, 16 * collection + 16))
    for collection in range(3):
        first, second, third = passes[3 * collection : 3 * collection + 3]
        assert [min(step) for step in first] == [16 * collection + 4 * i for i in range(4)]  # as sampled
        for one, other in ((first, second), (second, third), (first, third)):
            assert sorted(map(sorted, one)) != sorted(map(sorted, other))  # other company, not another order of steps
    # another reshuffle in each collection
    relative = [[{draw % 16 for draw in step} for step in passes[i]] for i in (1, 4, 7)]
    assert relative[0] != relative[1] != relative[2] != relative[0]


def test_the_reshuffle_depends_on_the_seed():
    one, again, other = (steps(all_ranks(1, 8, shuffle=False, **FOUR_STEPS, seed=seed)[0][0], 2) for seed in (5, 5, 6))
    assert one == again
    assert one[:4] == other[:4] and one[4:8] != other[4:8]


def test_steps_that_are_not_whole_groups_keep_their_order():
    # 6 rows a step, groups of 4: only all six steps together are whole groups
    options = {"per_device_train_batch_size": 6, "steps_per_generation": 6, "num_iterations": 3}
    made, _ = loader(9, **options)
    rows = steps(epochs(made), 1)
    assert rows[:6] == rows[6:12] == rows[12:18]
    assert flat(rows[:6]) == [(draw, g) for draw in range(9) for g in range(G)]


def test_micro_batches_smaller_than_a_group_within_steps_of_whole_groups():
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 16}
    made, _ = loader(8, num_iterations=2, **options)
    batches = list(epochs(made))
    assert {len(batch) for batch in batches} == {2}
    rows = steps(batches, 4)
    for step in rows:
        assert step == [(draw, g) for draw in dict.fromkeys(draw for draw, _ in step) for g in range(G)]
    assert sorted(flat(rows[:4])) == sorted(flat(rows[4:])) == [(d, g) for d in range(8) for g in range(G)]
    assert [set(step) for step in rows[:4]] != [set(step) for step in rows[4:]]


def test_prompts_stay_with_their_completions():
    made, rollouts = loader(24, **FOUR_STEPS)
    batches = list(epochs(made))
    ids = {p.draw: p.ids for prompts in rollouts.collections for p in prompts}
    for batch in batches:
        for row, (draw, _) in enumerate(numbers(batch)):
            assert batch.prompt_ids[row][batch.prompt_mask[row].bool()].tolist() == ids[draw]


def test_the_source_batch_is_left_as_collected():
    made, rollouts = loader(16, **FOUR_STEPS)
    kept = []
    made.collect = lambda prompts: kept.append(rollouts.collect(prompts)) or kept[-1]
    list(epochs(made))
    assert len(kept) == 1
    assert_same(kept[0], Rollouts().collect(rollouts.collections[0]))


# ---- Token weights ----


class Ranks:
    """`all_reduce` between threads. As in a real collective, a rank that is alone in its call waits (here: fails)."""

    def __init__(self, world_size):
        self.values = [torch.zeros(())] * world_size
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.calls = 0

    def all_reduce(self, rank):
        def reduce(value):
            self.values[rank] = value
            self.calls += rank == 0
            self.barrier.wait()
            total = torch.stack(self.values).sum(0)
            self.barrier.wait()  # before any rank writes its next value
            return total

        return reduce


def in_lockstep(world_size, per_device, data=40, **options):
    """The micro-batches of an epoch on each of several ranks, which run at the same time. -> (per rank, Ranks)"""
    ranks = Ranks(world_size)

    def run(rank):
        made, _ = loader(
            data, rank=rank, world_size=world_size, all_reduce=ranks.all_reduce(rank),
            per_device_train_batch_size=per_device, **options,
        )  # fmt: skip
        return list(epochs(made))

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(run, range(world_size))), ranks


@pytest.mark.parametrize("token_weighting", ["token", "sequence"])
@pytest.mark.parametrize(("world_size", "per_device"), SPLITS)
def test_weights_of_a_step_sum_to_the_number_of_ranks(world_size, per_device, token_weighting):
    options = {**FOUR_STEPS, "token_weighting": token_weighting}
    batches, ranks = in_lockstep(world_size, per_device, **options)
    assert [len(rank) for rank in batches] == [72] * world_size  # 3 collections x 3 passes x 8 micro-batches
    assert ranks.calls == 36  # one reduction per optimizer step
    for start in range(0, 72, 2):
        step = [batch for rank in batches for batch in rank[start : start + 2]]
        assert sum(batch.token_weights.double().sum() for batch in step) == pytest.approx(world_size, rel=1e-6)
        for batch in step:
            assert batch.token_weights.dtype == torch.float32
            assert batch.token_weights.shape == batch.loss_mask.shape
            assert torch.equal(batch.token_weights > 0, batch.loss_mask.bool())


@pytest.mark.parametrize("token_weighting", ["token", "sequence", "max_length"])
def test_a_completion_weighs_the_same_on_any_number_of_ranks(token_weighting):
    """Once the world size is undone, which is what averaging gradients over ranks does."""
    weights = []
    for world_size, per_device in SPLITS:
        batches, _ = in_lockstep(world_size, per_device, **FOUR_STEPS, token_weighting=token_weighting)
        weights.append(
            {
                (start // 2, row): total / world_size
                for rank in batches
                for start, batch in enumerate(rank)
                for row, total in zip(numbers(batch), batch.token_weights.sum(1).tolist(), strict=True)
            }
        )
    assert len(weights[0]) == 36 * 4 * G
    assert weights[1] == pytest.approx(weights[0], rel=1e-6)
    assert weights[2] == pytest.approx(weights[0], rel=1e-6)


def test_weights_by_hand():
    # one step of two micro-batches of one group each; lengths 1, 4, 2, 5 (draw 0) and 2, 5, 3, 1 (draw 1)
    made, _ = loader(2, per_device_train_batch_size=4, gradient_accumulation_steps=2, token_weighting="sequence")
    first, second = epochs(made)
    assert first.completion_mask.sum(1).tolist() == [1, 4, 2, 5]
    assert second.completion_mask.sum(1).tolist() == [
        2,
        5,
        3,
        1,
    ]
    torch.testing.assert_close(first.token_weights[1], torch.tensor([1, 1, 1, 1, 0]) / 4 / 8)
    torch.testing.assert_close(second.token_weights[2], torch.tensor([1, 1, 1, 0, 0]) / 3 / 8)

    made, _ = loader(2, per_device_train_batch_size=4, gradient_accumulation_steps=2, token_weighting="token")
    for batch in epochs(made):
        torch.testing.assert_close(batch.token_weights, batch.loss_mask / 23)


def test_the_entropy_bonus_is_a_mean_over_tokens_whatever_the_loss_is():
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "entropy_coef": 0.1}
    made, _ = loader(2, token_weighting="sequence", **options)
    for batch in epochs(made):
        torch.testing.assert_close(batch.mean_weights, batch.loss_mask / 23)
        assert not torch.equal(batch.mean_weights, batch.token_weights)


@pytest.mark.parametrize(("tokens_elsewhere", "skips"), [(0, True), (3, False)])
def test_an_update_is_skipped_where_nothing_counts_on_any_rank(tokens_elsewhere, skips):
    class Nothing(Rollouts):
        def collect(self, take):
            batch = super().collect(take(2))
            batch.loss_mask.zero_()
            return batch

    made, _ = loader(rollouts=Nothing(), dynamic_sampling=True, all_reduce=lambda value: value + tokens_elsewhere)
    next(iter(made))
    assert made.skips_update is skips


# ---- Epochs ----


def test_an_epoch_is_whole_collections_completed_from_the_next_order():
    # 10 prompts, 4 per collection: the third collection lacks two
    made, rollouts = loader(10, per_device_train_batch_size=16)
    assert len(made) == made.collections_per_epoch == 3
    list(epochs(made, 2))
    orders = [epoch_order(10, 5, epoch, True) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert flat(rollouts.examples[:3]) == orders[0] + orders[1][:2]
    assert flat(rollouts.examples[3:]) == orders[1] + orders[2][:2]
    assert flat(rollouts.draws) == list(range(24))  # a prompt that comes again is another draw


def test_without_shuffling_prompts_come_as_they_are():
    made, rollouts = loader(6, per_device_train_batch_size=16, shuffle=False)
    list(epochs(made, 2))
    assert rollouts.examples == [[0, 1, 2, 3], [4, 5, 0, 1]] * 2


def test_a_dataset_smaller_than_a_collection():
    made, rollouts = loader(3, per_device_train_batch_size=32)
    assert len(made) == 1
    list(epochs(made, 2))
    orders = [epoch_order(3, 5, epoch, True) for epoch in range(4)]
    assert rollouts.examples == [orders[0] + orders[1] + orders[2][:2], orders[1] + orders[2] + orders[3][:2]]
    assert rollouts.draws == [list(range(8)), list(range(8, 16))]


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (16, {"per_device_train_batch_size": 8}, 8),  # 2 groups per collection
        (17, {"per_device_train_batch_size": 8}, 9),
        (17, {"per_device_train_batch_size": 8, "num_iterations": 3}, 27),
        (16, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 16),
        (16, {"per_device_train_batch_size": 4, "steps_per_generation": 6, "num_iterations": 2}, 36),
        (1, {"per_device_train_batch_size": 4, "steps_per_generation": 6, "num_iterations": 2}, 12),
    ],
)
def test_length_is_what_an_epoch_yields(data, options, expected):
    made, rollouts = loader(data, **options)
    assert len(made) == expected
    assert len(made.dataset) == data
    assert len(list(made)) == expected  # here to the end of the iterator
    assert made.position == expected
    assert len(rollouts.collections) == made.collections_per_epoch
    assert len(list(made)) == expected  # and the next epoch


def test_length_for_several_ranks():
    made, _ = loader(40, rank=1, world_size=4, per_device_train_batch_size=2, **FOUR_STEPS)
    assert len(made) == 72
    assert len(loader(40, **FOUR_STEPS)[0]) == 72


def test_an_epoch_stopped_early_is_not_taken_up_again():
    straight, _ = loader(10, **FOUR_STEPS)
    expected = list(epochs(straight, 2))
    made, rollouts = loader(10, **FOUR_STEPS)
    taken = list(islice(iter(made), 5))  # in the middle of the first collection, and of an optimizer step
    made.set_epoch(1)
    assert made.position == len(made)
    taken += islice(iter(made), len(made))
    for batch, other in zip(taken, expected[:5] + expected[len(made) :], strict=True):
        assert_same(batch, other)
    assert rollouts.draws == [list(range(16)), list(range(16, 32))]


def test_set_epoch_does_not_go_back():
    made, _ = loader(10, **FOUR_STEPS)
    first = list(islice(iter(made), 4))
    made.set_epoch(0)  # as the Trainer does when it resumes inside an epoch
    rest = list(islice(iter(made), len(made) - 4))
    straight, _ = loader(10, **FOUR_STEPS)
    for batch, other in zip(first + rest, epochs(straight), strict=True):
        assert_same(batch, other)


def test_the_last_micro_batch_of_an_epoch_may_leave_the_iterator_open():
    exhausted, _ = loader(10, **FOUR_STEPS)
    expected = [*exhausted, *exhausted]
    made, _ = loader(10, **FOUR_STEPS)
    open_iterators = []
    taken = []
    for _ in range(2):
        iterator = iter(made)
        taken += [next(iterator) for _ in range(len(made))]
        open_iterators.append(iterator)  # not closed, either
    for batch, other in zip(taken, expected, strict=True):
        assert_same(batch, other)


# ---- Buffer ----


def test_a_collection_is_sampled_once_and_when_it_is_needed():
    made, rollouts = loader(32, **FOUR_STEPS)
    iterator = iter(made)
    assert rollouts.collections == []
    for yielded in range(1, 49):
        next(iterator)
        assert len(rollouts.collections) == (1 if yielded <= 24 else 2)


def test_the_old_buffer_is_freed_before_the_next_collection():
    alive = []

    class Watched(Rollouts):
        def collect(self, prompts):
            assert [ref() for ref in alive] == [None] * len(alive)
            batch = super().collect(prompts)
            alive.extend(map(weakref.ref, (batch, batch.completion_ids, batch.old_per_token_logps)))
            return batch

    made, rollouts = loader(32, rollouts=Watched(), **FOUR_STEPS)
    for batch in epochs(made, 2):
        assert batch is not None
        assert alive[-3]() is not None  # the current one is there
    assert len(rollouts.collections) == 4


# ---- Position ----

# 3 collections of 4 groups in an epoch of 10 prompts; each has 2 optimizer steps of 2 micro-batches, passed over twice
RESUMED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
}


@pytest.mark.parametrize("kind", ["indexed", "stream"])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_resume_at_every_step_of_two_epochs(tmp_path, kind, rank, world_size):
    def make():
        return loader(stream(20) if kind == "stream" else 10 * world_size, rank=rank, world_size=world_size, **RESUMED)

    straight, sampled = make()
    batches = straight if kind == "stream" else epochs(straight, 2)
    expected, boundaries = [], []
    for batch in islice(iter(batches), 48):
        expected.append(batch)
        if straight.position % 2 == 0:
            folder = tmp_path / str(straight.position)
            checkpoint.save(str(folder), rank, {"loader": straight.state_dict()})
            boundaries.append((straight.position, folder))
    assert len(boundaries) == 24

    for position, folder in boundaries:
        resumed, rollouts = make()
        resumed.load_state_dict(checkpoint.load(str(folder), rank)["loader"])
        assert resumed.position == position
        first = position // 24
        rest = resumed if kind == "stream" else epochs(resumed, 2 - first, first)
        rest = list(islice(iter(rest), 48 - position))
        for batch, other in zip(rest, expected[position:], strict=True):
            assert_same(batch, other)
        # a collection that was begun is not sampled again, one that was used up even less
        begun = -(-position // 8)
        assert rollouts.draws == sampled.draws[begun:]
        assert rollouts.examples == sampled.examples[begun:]


def test_resume_in_the_middle_of_a_step():
    # a state taken while a window is being prefetched
    straight, _ = loader(10, **RESUMED)
    expected = list(epochs(straight))
    made, _ = loader(10, **RESUMED)
    list(islice(iter(made), 5))
    resumed, rollouts = loader(10, **RESUMED)
    resumed.load_state_dict(made.state_dict())
    for batch, other in zip(epochs(resumed), expected[5:], strict=True):
        assert_same(batch, other)
    assert rollouts.draws == [list(range(4, 8)), list(range(8, 12))]


def test_state_is_plain_numbers_and_tensors():
    made, _ = loader(10, **RESUMED)
    fresh = made.state_dict()
    assert (fresh["position"], fresh["collection"], fresh["buffer"]) == (0, None, {})
    iterator = iter(made)
    for position in range(1, 9):
        next(iterator)
        state = made.state_dict()
        numbers_only = {name: value for name, value in state.items() if name != "buffer"}
        assert json.loads(json.dumps(numbers_only)) == numbers_only
        assert state["position"] == position
        if position == 8:  # used up: nothing to keep
            assert state["collection"] is None and state["buffer"] == {}
        else:
            assert state["collection"] == 0
            assert len(state["buffer"]["completion_ids"]) == 16
            assert all(isinstance(value, torch.Tensor) for value in state["buffer"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size: 4 then, 8 now"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 2 then, 4 now"),
        ({"steps_per_generation": 8}, "steps_per_generation: 4 then, 8 now"),
        ({"num_generations": 2}, "num_generations: 4 then, 2 now"),
        ({"num_iterations": 3}, "num_iterations: 2 then, 3 now"),
        ({"seed": 6}, "seed: 5 then, 6 now"),
        ({"data_seed": 6}, "data_seed: None then, 6 now"),
        ({"shuffle_dataset": False}, "shuffle_dataset: True then, False now"),
        ({"dynamic_sampling": True}, "dynamic_sampling: False then, True now"),
        ({"data": 11}, "prompts: 10 then, 11 now"),
        ({"world_size": 2}, "1 then, 2 now"),
    ],
)
def test_a_state_of_another_layout_is_refused(change, message):
    made, _ = loader(10, **RESUMED)
    list(islice(iter(made), 3))
    other, rollouts = loader(**{"data": 10, **RESUMED, **change})
    with pytest.raises(ValueError, match="cannot continue") as error:
        other.load_state_dict(made.state_dict())
    assert message in str(error.value)
    # names what differs and nothing else; other data have other rows too
    assert str(error.value).count(" then, ") == 1 + ("data" in change)
    assert other.position == 0 and rollouts.collections == []
    # and the same layout is taken
    same, _ = loader(10, **RESUMED)
    same.load_state_dict(made.state_dict())
    assert same.position == 3


def test_every_difference_of_layout_is_named():
    made, _ = loader(10, **RESUMED)
    other, _ = loader(11, **{**RESUMED, "num_iterations": 3, "per_device_train_batch_size": 8, "seed": 6})
    with pytest.raises(ValueError) as error:
        other.load_state_dict(made.state_dict())
    differences = (
        "num_iterations: 2 then, 3 now",
        "per_device_train_batch_size: 4 then, 8 now",
        "seed: 5 then, 6 now",
    )
    for message in (*differences, "10 then, 11 now"):
        assert message in str(error.value)


def test_a_map_style_set_and_a_stream_do_not_continue_each_other():
    made, _ = loader(10, **RESUMED)
    other, _ = loader(stream(10), **RESUMED)
    with pytest.raises(ValueError, match="10 then, None now"):
        other.load_state_dict(made.state_dict())


# ---- Streams ----


def stream(size):
    return IterableDataset.from_generator(examples, gen_kwargs={"size": size})


def examples(size):
    for i in range(size):
        yield {"id": i}


def test_a_stream_is_read_front_to_back_and_over_again():
    made, rollouts = loader(stream(6), per_device_train_batch_size=16, shuffle=False)
    assert len(list(islice(iter(made), 4))) == 4
    assert rollouts.examples == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 1, 2, 3]]
    assert rollouts.draws == [[4 * i + j for j in range(4)] for i in range(4)]


def test_positions_of_a_stream_may_be_skipped():
    source = StreamedPrompts(stream(5), seed=0, shuffle=False)
    assert [source.draw(0, position)["id"] for position in (0, 1, 3, 4, 5, 9, 13)] == [0, 1, 3, 4, 0, 4, 3]


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_a_stream(shuffle):
    alone, rollouts = loader(stream(12), shuffle=shuffle, **FOUR_STEPS)
    list(islice(iter(alone), 48))
    for rank in range(4):
        made, shared = loader(
            stream(12), rank=rank, world_size=4, shuffle=shuffle, per_device_train_batch_size=2, **FOUR_STEPS
        )
        list(islice(iter(made), 48))
        assert shared.examples == [examples[rank::4] for examples in rollouts.examples]
        assert shared.draws == [draws[rank::4] for draws in rollouts.draws]


def test_the_shuffle_buffer_of_a_stream():
    def laps(seed):
        source = StreamedPrompts(stream(30), seed=seed, shuffle=True)
        drawn = [source.draw(0, position)["id"] for position in range(60)]
        return drawn[:30], drawn[30:]

    first, second = laps(1)
    assert sorted(first) == sorted(second) == list(range(30))  # every example once a lap
    assert first != list(range(30)) and first != second  # shuffled, anew in each lap
    assert laps(1) == (first, second)
    assert laps(2)[0] != first


def test_an_empty_stream_is_an_error():
    made, rollouts = loader(stream(0))
    with pytest.raises(ValueError, match="yielded no example"):
        next(iter(made))
    assert rollouts.collections == []


def test_a_stream_has_no_length():
    made, _ = loader(stream(6))
    with pytest.raises(TypeError, match="max_steps"):
        len(made)
    with pytest.raises(TypeError, match="no length"):
        len(made.dataset)
    made.set_epoch(3)  # has nothing to go to
    assert made.position == 0


def test_datasets_are_told_apart_by_their_rows():
    rows = [{"prompt": "a", "extra": {1: 2, "b": [(3, None)]}}]
    same = [{"extra": {"b": [[3, None]], 1: 2}, "prompt": "a"}]
    assert data_fingerprint(rows) == data_fingerprint(same) != data_fingerprint([{"prompt": "a", "extra": {1: 3}}])


def test_epoch_order():
    order = epoch_order(100, seed=42, epoch=1, shuffle=True)
    assert sorted(order) == list(range(100))
    assert order == epoch_order(100, seed=42, epoch=1, shuffle=True)
    assert epoch_order(100, seed=42, epoch=2, shuffle=True) != order
    assert epoch_order(100, seed=43, epoch=0, shuffle=True) != order  # not a function of seed + epoch
    assert epoch_order(5, seed=42, epoch=1, shuffle=False) == [0, 1, 2, 3, 4]
