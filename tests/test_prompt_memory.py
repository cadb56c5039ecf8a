"""Per-prompt pass rates, and the skipping of prompts that follows from them. No model: rollouts are made up."""

import datetime
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset

from grpo_trl import checkpoint
from grpo_trl.batch import Group, Prompt
from grpo_trl.callbacks import read_parquet, write_parquet
from grpo_trl.loader import epoch_order
from grpo_trl.prompt_memory import PromptMemory, key_of
from tests.test_loader import G, Rollouts, assert_same, epochs, flat, loader, stream

NAN = float("nan")


def memory(**options):
    return PromptMemory(**options)


def group(draw, *ids, prompt=None):
    return Group(Prompt(list(ids), {"prompt": prompt or f"text {ids}"}, draw), [[1]] * G, [True] * G)


def alone(values):
    return values


def remember(kept, *rows, ids=(5,), step=0):
    """Draws of one prompt, one after the other, with these verdicts."""
    for draw, row in enumerate(rows):
        kept.update([group(draw, *ids)], [row], step, alone)
    return kept.records[key_of(Prompt(list(ids), {}, 0))]


# ---- Records ----


def test_counts_by_hand():
    record = remember(memory(), [1, 1, 0, 0], [1, 1, 1, 1], [1, NAN, 1, NAN], step=7)
    assert (record.draws, record.completions, record.passed) == (3, 10, 8)
    assert (record.solved_streak, record.hopeless_streak, record.last_step) == (2, 0, 7)
    assert record.prompt == "text (5,)"


@pytest.mark.parametrize(
    ("rows", "streaks"),
    [
        ([[1] * 4], (1, 0)),
        ([[0] * 4], (0, 1)),
        ([[1] * 4, [1] * 4, [1, 1, 1, 0]], (0, 0)),
        ([[1] * 4, [0] * 4, [0] * 4], (0, 2)),
        ([[0] * 4, [1] * 4], (1, 0)),
        ([[1] * 4, [NAN] * 4], (0, 0)),  # nothing was judged: neither solved nor hopeless
        ([[0, NAN, NAN, 0]], (0, 1)),
    ],
)
def test_streaks(rows, streaks):
    record = remember(memory(), *rows)
    assert (record.solved_streak, record.hopeless_streak) == streaks


@pytest.mark.parametrize(
    ("options", "row", "skipped_after"),
    [
        ({}, [1] * 4, None),
        ({"skip_solved_after": 2}, [1] * 4, 2),
        ({"skip_solved_after": 2}, [0] * 4, None),
        ({"skip_hopeless_after": 1}, [0] * 4, 1),
        ({"skip_hopeless_after": 1}, [1, 0, 0, 0], None),
        ({"skip_solved_after": 1, "skip_hopeless_after": 3}, [0] * 4, 3),
    ],
)
def test_a_prompt_is_skipped_after_so_many_draws_in_a_row(options, row, skipped_after):
    kept, prompt = memory(**options), Prompt([5], {}, 0)
    skipped = []
    for _ in range(4):
        remember(kept, row)
        skipped.append(kept.skips(prompt))
        assert kept.num_skipped == skipped[-1]
    assert skipped == [skipped_after is not None and draws >= skipped_after for draws in range(1, 5)]
    assert not kept.skips(Prompt([6], {}, 0))  # one that was never drawn
    assert kept.can_skip == bool(options)


def test_a_conversation_with_a_date_is_kept_as_text():
    message = {"role": "user", "content": "Hi", "timestamp": datetime.datetime(2024, 5, 1)}
    kept = memory()
    kept.update([group(0, 5, prompt=[message])], [[1] * G], 0, alone)
    assert "2024-05-01" in kept.table()["prompt"][0]


def test_a_prompt_is_known_by_its_tokens():
    one, same, other = Prompt([1, 23], {"prompt": "a"}, 0), Prompt([1, 23], {"prompt": "b"}, 9), Prompt([12, 3], {}, 0)
    assert key_of(one) == key_of(same) != key_of(other)
    assert key_of(one) == "4fa09a6fe296dfd7"  # as ever, and on every machine: it stands in checkpoints


def ranks_of(world_size, draws):
    """The memory of each rank after two rollouts of draws (draw, id, rewards), dealt out in turn; at the same time."""
    told, barrier = [[] for _ in range(world_size)], threading.Barrier(world_size, timeout=20)
    memories = [memory() for _ in range(world_size)]

    def run(rank):
        def gather(values):
            told[rank] = values
            barrier.wait()
            everything = [value for rank in reversed(range(world_size)) for value in told[rank]]
            barrier.wait()
            return everything

        for step, rollout in enumerate(draws):
            mine = rollout[rank::world_size]
            groups = [group(draw, ids) for draw, ids, _ in mine]
            memories[rank].update(groups, [rewards for *_, rewards in mine], step, gather)

    with ThreadPoolExecutor(world_size) as threads:
        list(threads.map(run, range(world_size)))
    return memories


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_holds_the_same_memory(world_size):
    solved, hopeless = [1] * G, [0] * G
    # prompt 8 twice in the first rollout, on two ranks: its streak depends on the order of the draws
    draws = [
        [(0, 7, solved), (1, 8, hopeless), (2, 8, solved), (3, 9, [1, 0, 0, 0])],
        [(4, 9, hopeless), (5, 7, solved), (6, 8, solved), (7, 10, hopeless)],
    ]
    (expected,) = ranks_of(1, draws)
    assert expected.table() == {
        "prompt": ["text (7,)", "text (8,)", "text (9,)", "text (10,)"],
        "draws": [2, 3, 2, 1],
        "completions": [8, 12, 8, 4],
        "passed": [8, 8, 1, 0],
        "solved_streak": [2, 2, 0, 0],
        "hopeless_streak": [0, 0, 1, 1],
        "last_step": [1, 1, 1, 1],
        "pass_rate": [1, 8 / 12, 1 / 8, 0],
        "key": [key_of(Prompt([ids], {}, 0)) for ids in (7, 8, 9, 10)],
    }
    for kept in ranks_of(world_size, draws):
        assert kept.table() == expected.table()


def test_round_trip_through_parquet(tmp_path):
    kept = memory(skip_hopeless_after=1)
    messages = [{"role": "user", "content": "drei €"}]
    kept.update([group(0, 5, prompt=messages), group(1, 6)], [[0] * 4, [NAN] * 4], 3, alone)
    write_parquet(kept.table(), tmp_path / "memory.parquet")
    table = read_parquet(tmp_path / "memory.parquet")
    assert table["prompt"] == ['[{"role": "user", "content": "drei €"}]', "text (6,)"]
    assert table["pass_rate"] == [0.0, None]
    again = memory(skip_hopeless_after=1)
    again.load_table(table)
    assert again.records == kept.records and list(again.records) == list(kept.records)
    assert again.skips(Prompt([5], {}, 0)) and not again.skips(Prompt([6], {}, 0))


def test_an_empty_memory_round_trips(tmp_path):
    write_parquet(memory().table(), tmp_path / "memory.parquet")
    kept = memory()
    kept.load_table(read_parquet(tmp_path / "memory.parquet"))
    assert kept.records == {}


# ---- Skipping: what the loader draws ----

# 12 prompts, 4 per collection, so 3 collections in an epoch
SIZES = {1: 16, 2: 8, 4: 4}  # ranks: completions of each in a micro-batch
SOLVED, HOPELESS = {0, 3, 4, 7}, {1, 9}
RULES = {"skip_solved_after": 1, "skip_hopeless_after": 2}


class Remembering(Rollouts):
    """Scores what it is given by the prompt's id and tells the memory."""

    def __init__(self, kept, gather=alone, solved=SOLVED, hopeless=HOPELESS):
        super().__init__()
        self.kept, self.gather, self.solved, self.hopeless = kept, gather, solved, hopeless

    def encode(self, example, draw):
        return Prompt([example["id"] + 1], {**example, "prompt": f"prompt {example['id']}"}, draw)

    def collect(self, prompts):
        rewards = [self._rewards(prompt.example["id"]) for prompt in prompts]
        groups = [Group(prompt, [[1]] * G, [True] * G) for prompt in prompts]
        self.kept.update(groups, rewards, len(self.collections), self.gather)
        return super().collect(prompts)

    def _rewards(self, number):
        return [1] * G if number in self.solved else [0] * G if number in self.hopeless else [1, 0, 0, 0]


def skipping(data=12, *, world_size=1, rank=0, gather=alone, rules=RULES, sets=(SOLVED, HOPELESS), **options):
    kept = memory(**rules)
    options = {"per_device_train_batch_size": SIZES[world_size]} | options
    rollouts = Remembering(kept, gather, *sets)
    return loader(data, rank=rank, world_size=world_size, rollouts=rollouts, memory=kept, **options)


def run_ranks(world_size, count, data=12, **options):
    """(draws, ids) of each of the first collections on each rank; ranks run at the same time."""
    told, barrier = [[] for _ in range(world_size)], threading.Barrier(world_size, timeout=20)

    def run(rank):
        def gather(values):
            told[rank] = values
            barrier.wait()
            everything = [value for part in told for value in part]
            barrier.wait()
            return everything

        made, rollouts = skipping(data, world_size=world_size, rank=rank, gather=gather, **options)
        batches = iter(made) if options.get("streamed") else epochs(made, count)
        list(islice(batches, count))
        return rollouts, made

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(run, range(world_size)))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_skip_the_same_prompts_and_share_the_others(world_size):
    ((expected, one),) = run_ranks(1, 12)
    assert len(expected.collections) == 12
    for rank, (rollouts, made) in enumerate(run_ranks(world_size, 12)):
        assert rollouts.draws == [draws[rank::world_size] for draws in expected.draws]
        assert rollouts.examples == [ids[rank::world_size] for ids in expected.examples]
        assert (made.drawn, made.passed_over) == (one.drawn, one.passed_over)
        assert rollouts.kept.table() == expected.kept.table()


def test_a_skipped_prompt_is_replaced_by_the_next_one():
    """Worked by hand: which prompts come, in the order of the epochs, and under which numbers."""
    ((rollouts, made),) = run_ranks(1, 9)
    order = flat(epoch_order(12, 5, lap, True) for lap in range(8))
    expected, drawn = [], dict.fromkeys(range(12), 0)
    place = iter(range(len(order)))
    for _ in range(9):
        collection = []
        skipped = {n for n in SOLVED if drawn[n] >= 1} | {n for n in HOPELESS if drawn[n] >= 2}
        while len(collection) < 4:
            draw = next(place)
            if order[draw] not in skipped:
                collection.append(draw)
                drawn[order[draw]] += 1
        expected.append(collection)
    assert rollouts.draws == expected
    assert rollouts.examples == [[order[draw] for draw in draws] for draws in expected]
    assert made.drawn == expected[-1][-1] + 1 > 36  # more than were given out
    seen = flat(rollouts.examples)
    assert all(seen.count(number) == 1 for number in SOLVED) and all(seen.count(number) == 2 for number in HOPELESS)


def test_how_many_were_passed_over():
    made, rollouts = skipping(8, shuffle=False, sets=({0, 1, 2}, set()))
    passed_over = []
    for _ in epochs(made, 3):
        passed_over.append(made.passed_over)
    assert rollouts.examples == [[0, 1, 2, 3], [4, 5, 6, 7], [3, 4, 5, 6], [7, 3, 4, 5], [6, 7, 3, 4], [5, 6, 7, 3]]
    assert passed_over == [0, 0, 3, 3, 3, 3]


def test_without_rules_nothing_changes():
    plain, _ = loader(10, per_device_train_batch_size=16)
    made, rollouts = skipping(10, rules={})
    first, second = list(epochs(plain, 3)), list(epochs(made, 3))
    assert len(first) == len(second) == 9
    assert rollouts.draws == [list(range(4 * i, 4 * i + 4)) for i in range(9)]
    assert rollouts.examples == plain_examples(10, 9)


def plain_examples(size, count):
    made, rollouts = loader(size, per_device_train_batch_size=16)
    list(epochs(made, 3))
    return rollouts.examples[:count]


@pytest.mark.parametrize("data", [6, "stream"])
def test_when_all_prompts_are_skipped_they_are_drawn_as_they_come(data, caplog):
    MultiProcessAdapter.warning_once.cache_clear()
    everything = (set(range(6)), set())
    with caplog.at_level(logging.WARNING):
        made, rollouts = skipping(stream(6) if data == "stream" else 6, shuffle=False, sets=everything)
        list(islice(iter(made) if data == "stream" else epochs(made, 6), 8))
    # 4 and 5 are what is left of the second lap too; from then on all six are passed over twice, then drawn
    assert rollouts.examples[:4] == [[0, 1, 2, 3], [4, 5, 4, 5], [0, 1, 2, 3], [4, 5, 0, 1]]
    assert rollouts.draws[1:4] == [[4, 5, 10, 11], [24, 25, 26, 27], [40, 41, 42, 43]]
    assert len(rollouts.examples) == 8
    assert made.passed_over == 12
    warnings = [record.message for record in caplog.records if "Too few prompts are left" in record.message]
    assert len(warnings) == 1 and "skip_solved_after" in warnings[0]


def test_few_prompts_that_are_left_come_twice_and_skipped_ones_fill_up():
    made, rollouts = skipping(8, shuffle=False, rules={"skip_solved_after": 1}, sets=({0, 1, 2, 3, 4, 5, 6}, set()))
    list(epochs(made, 2))
    assert rollouts.examples[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # 0 to 6 are passed over, 7 comes, 0 to 6 again, 7 comes, and the rest as they are
    assert rollouts.examples[2] == [7, 7, 0, 1]


def test_one_prompt_of_many_rows_is_passed_over_as_often_as_it_comes(caplog):
    MultiProcessAdapter.warning_once.cache_clear()
    data = Dataset.from_dict({"id": [0] * 8 + [1, 2, 3, 4]})
    made, rollouts = skipping(data, shuffle=False, sets=({0}, set()))
    list(epochs(made, 2))
    assert rollouts.examples[:4] == [[0, 0, 0, 0], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert not caplog.records


def test_a_prompt_that_is_no_longer_solved_comes_back():
    made, rollouts = skipping(8, shuffle=False, sets=({0, 1, 2, 3, 4, 5, 6}, set()))
    batches = epochs(made, 4)
    list(islice(batches, 2))
    rollouts.solved = set()
    list(islice(batches, 6))
    assert rollouts.examples[2] == [7, 7, 0, 1]
    assert {0, 1} < set(flat(rollouts.examples[3:]))
    assert not rollouts.kept.skips(Prompt([1], {}, 0))


@pytest.mark.parametrize("data", [12, "stream"])
def test_resume_at_every_step(tmp_path, data):
    def make():
        return skipping(
            stream(12) if data == "stream" else 12, steps_per_generation=2, per_device_train_batch_size=8,
            num_iterations=2,
        )  # fmt: skip

    straight, sampled = make()
    expected, folders = [], []
    batches = iter(straight) if data == "stream" else epochs(straight, 3)
    for batch in islice(batches, 36):
        expected.append(batch)
        folder = tmp_path / str(straight.position)
        checkpoint.save(str(folder), 0, {"loader": straight.state_dict()})
        write_parquet(sampled.kept.table(), folder / "memory.parquet")
        folders.append(folder)
    assert len(folders) == 36 and straight.passed_over

    for position, folder in enumerate(folders[:-1], start=1):
        resumed, rollouts = make()
        resumed.load_state_dict(checkpoint.load(str(folder), 0)["loader"])
        rollouts.kept.load_table(read_parquet(folder / "memory.parquet"))
        first = position // 12
        rest = iter(resumed) if data == "stream" else epochs(resumed, 3 - first, first)
        for batch, other in zip(islice(rest, 36 - position), expected[position:], strict=True):
            assert_same(batch, other)
        assert rollouts.draws == sampled.draws[-(-position // 4) :]


def test_skipping_cannot_be_turned_on_within_a_run():
    plain, _ = loader(12, per_device_train_batch_size=16)
    list(islice(iter(plain), 2))
    made, _ = skipping()
    with pytest.raises(ValueError, match="skip_solved_after or skip_hopeless_after set: False then, True now"):
        made.load_state_dict(plain.state_dict())
    other, _ = skipping(rules={"skip_solved_after": 5})
    other.load_state_dict(made.state_dict())  # how many draws it takes may change
    assert other.drawn == made.drawn
