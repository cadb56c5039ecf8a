"""Which rank evaluates what, and every number of the summary worked by hand."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch

from grpo_trl import evaluation
from grpo_trl.batch import Group, Prompt
from grpo_trl.evaluation import evaluate_prompts, records, rows_of_rank, summarize
from grpo_trl.rewards import RewardScorer

NONE = float("nan")  # what a reward function's None becomes


def group(row, lengths, terminated=None):
    prompt = Prompt([1], {"prompt": "?"}, row)
    return Group(
        prompt, [[7] * n for n in lengths], terminated or [True] * len(lengths), completions=["x"] * len(lengths)
    )


def record(row, *rewards, lengths=None, terminated=None):
    """One prompt; each reward is a completion's, a number or one per function."""
    rewards = [list(r) if isinstance(r, tuple) else [r] for r in rewards]
    return {
        "row": row,
        "rewards": rewards,
        "lengths": lengths or [3] * len(rewards),
        "terminated": terminated or [True] * len(rewards),
    }


def summary(*results, names=("a",), weights=None, threshold=1.0):
    return summarize(results, names, torch.tensor(weights or [1.0] * len(names)), threshold)


# ---- Rows ----


@pytest.mark.parametrize(
    ("num_rows", "world_size", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 2], [1, 3]]),
        (5, 2, [[0, 2, 4], [1, 3, 5]]),
        (7, 3, [[0, 3, 6], [1, 4, 7], [2, 5, 8]]),
        (1, 3, [[0], [1], [2]]),
        (0, 2, [[], []]),
    ],
)
def test_rows_are_dealt_out_in_turn(num_rows, world_size, expected):
    assert [rows_of_rank(num_rows, rank, world_size) for rank in range(world_size)] == expected


@pytest.mark.parametrize("num_rows", range(1, 14))
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_row_has_one_rank_and_every_rank_the_same_number(num_rows, world_size):
    ranks = [rows_of_rank(num_rows, rank, world_size) for rank in range(world_size)]
    rows = [row for rank in ranks for row in rank]
    assert sorted(row for row in rows if row < num_rows) == list(range(num_rows))
    assert len({len(rank) for rank in ranks}) == 1
    assert len(rows) - num_rows < world_size  # no more repeats than needed


# ---- Records ----


def test_records_by_hand():
    groups = [group(4, [1, 5], [True, False]), group(2, [2, 2])]
    rewards = torch.tensor([[1.0, NONE], [0.5, 2.0], [0.0, -1.0], [0.25, 3.0]])
    first, second = records(groups, rewards)
    assert first["row"] == 4 and second["row"] == 2  # in the order of the groups
    assert first["lengths"] == [1, 5] and second["lengths"] == [2, 2]
    assert first["terminated"] == [True, False] and second["terminated"] == [True, True]
    assert first["rewards"][1] == [0.5, 2.0] and second["rewards"] == [[0.0, -1.0], [0.25, 3.0]]
    assert first["rewards"][0][0] == 1.0 and first["rewards"][0][1] != first["rewards"][0][1]  # NaN stays NaN


def test_records_of_groups_of_different_sizes_keep_their_rewards():
    made = records([group(0, [1]), group(1, [1, 2, 3])], torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    assert [r["rewards"] for r in made] == [[[0.0]], [[1.0], [2.0], [3.0]]]


def test_rewards_that_do_not_match_the_completions_are_an_error():
    with pytest.raises(RuntimeError):
        records([group(0, [1, 2])], torch.zeros(3, 1))


def test_records_travel_between_ranks():
    made = records([group(0, [1, 2])], torch.tensor([[0.5], [1.5]]))
    assert pickle.loads(pickle.dumps(made)) == made
    assert not any(isinstance(value, torch.Tensor) for value in made[0].values())


# ---- Summary ----


def test_summary_by_hand():
    result = summary(
        record(0, 1.0, 0.0, lengths=[2, 4], terminated=[True, False]),
        record(1, 0.5, 0.0, lengths=[6, 8]),
        record(2, 2.0, 1.0, lengths=[1, 3], terminated=[True, False]),
    )
    assert result == {
        "reward": pytest.approx(4.5 / 6),
        "reward_std": pytest.approx(stdev([1, 0, 0.5, 0, 2, 1])),
        "rewards/a/mean": pytest.approx(4.5 / 6),
        "rewards/a/pass@2": pytest.approx(2 / 3),  # prompts 0 and 2
        "avg@2": pytest.approx(3 / 6),  # 1.0, 2.0 and 1.0 reach 1
        "pass@2": pytest.approx(2 / 3),
        "completions/mean_length": pytest.approx(24 / 6),
        "completions/clipped_ratio": pytest.approx(2 / 6),
    }
    assert all(type(value) is float for value in result.values())


def test_each_function_has_its_own_numbers_and_the_first_is_judged():
    result = summary(
        record(0, (0.0, 5.0), (1.0, 0.0), (0.0, 0.0)),
        record(1, (0.0, 5.0), (0.0, 5.0), (0.0, 5.0)),
        names=("accuracy", "format"),
        weights=[2.0, 0.5],
    )
    assert result["reward"] == pytest.approx((2.5 + 2 + 0 + 3 * 2.5) / 6)  # weighted
    assert result["rewards/accuracy/mean"] == pytest.approx(1 / 6)  # not weighted
    assert result["rewards/format/mean"] == pytest.approx(20 / 6)
    assert result["rewards/accuracy/pass@3"] == 0.5 and result["rewards/format/pass@3"] == 1.0
    # every completion but one has a total above 1; only one is right
    assert result["avg@3"] == pytest.approx(1 / 6) and result["pass@3"] == 0.5
    assert [name for name in result if "@" in name] == [
        "rewards/accuracy/pass@3", "avg@3", "pass@3", "rewards/format/pass@3",
    ]  # fmt: skip


def test_the_weight_of_a_function_does_not_move_what_passes():
    for weight in (0.25, 4.0):
        result = summary(record(0, 1.0, 0.0), weights=[weight])
        assert result["avg@2"] == 0.5
        assert result["reward"] == weight / 2


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, 1.0), (0.25, 0.75), (0.5, 0.5), (0.51, 0.25), (1.1, 0.0)])
def test_threshold(threshold, expected):
    result = summary(record(0, 0.0, 0.25), record(1, 0.5, 1.0), threshold=threshold)
    assert result["avg@2"] == expected
    assert result["pass@2"] == {1.0: 1.0, 0.75: 1.0, 0.5: 0.5, 0.25: 0.5, 0.0: 0.0}[expected]


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 0.9, 1 / 3, 2.2])
def test_a_reward_equal_to_the_threshold_passes(value):
    """Rewards are fp32: 0.9 is slightly less than Python's 0.9."""
    scored = RewardScorer([lambda completions, **kwargs: [value, value - 0.01]]).score([group(0, [1, 1])])
    result = summary(*records([group(0, [1, 1])], scored), threshold=value)
    assert result["avg@2"] == 0.5 and result["pass@2"] == 1.0


def test_k_is_one():
    result = summary(record(0, 1.0), record(1, 0.0), record(2, 0.0))
    assert result["avg@1"] == result["pass@1"] == result["rewards/a/pass@1"] == pytest.approx(1 / 3)
    assert result["reward_std"] == pytest.approx(stdev([1, 0, 0]))


def test_a_single_completion_has_no_spread():
    result = summary(record(0, 0.5))
    assert result["reward"] == 0.5 and result["reward_std"] == 0.0


def test_rewards_that_do_not_apply_are_in_no_mean():
    result = summary(
        record(0, (1.0, NONE), (0.0, 2.0)),
        record(1, (NONE, 4.0), (NONE, NONE)),
        names=("a", "b"),
    )
    totals = [1.0, 2.0, 4.0]  # the last completion has none
    assert result["reward"] == pytest.approx(mean(totals))
    assert result["reward_std"] == pytest.approx(stdev(totals))
    assert result["rewards/a/mean"] == 0.5 and result["rewards/b/mean"] == 3.0
    assert result["avg@2"] == 0.5 and result["pass@2"] == 1.0  # of the first prompt; to the second, `a` does not apply
    assert result["rewards/b/pass@2"] == 1.0
    assert result["completions/mean_length"] == 3.0  # lengths are of all completions


def test_a_reward_that_never_applied_is_left_out():
    result = summary(record(0, (1.0, NONE)), record(1, (0.0, NONE)), names=("a", "b"))
    assert "rewards/b/mean" not in result
    assert result["reward"] == 0.5 and result["pass@1"] == 0.5


def test_when_no_reward_applied_at_all():
    result = summary(record(0, NONE, NONE))
    assert "reward" not in result and "reward_std" not in result and "rewards/a/mean" not in result
    assert result["completions/mean_length"] == 3.0


def test_nearly_equal_rewards_have_an_exact_spread():
    values = [1000.0 + i % 2 for i in range(4000)]
    result = summary(*(record(row, value) for row, value in enumerate(values)), threshold=1001)
    assert result["reward"] == 1000.5
    assert result["reward_std"] == pytest.approx(stdev(values), rel=1e-12)
    assert result["avg@1"] == 0.5


def test_the_order_of_the_records_does_not_matter():
    results = [record(row, 0.1 * row, 1.0 / (1 + row)) for row in range(20)]
    assert summary(*results) == summary(*reversed(results)) == summary(*results[1::2], *results[::2])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"": [], "b": []}, "the name of a set is empty"),
        ({1: [], "1": []}, "1 and '1' would have the same metrics or files"),
        ({"a/b": [], "a_b": []}, "'a/b' and 'a_b' would have the same metrics or files"),
    ],
)
def test_names_of_sets_that_are_none(sets, message):
    trainer = SimpleNamespace(args=SimpleNamespace(log_completions=True))
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate_sets(trainer, sets, "eval")
    evaluation.check_set_names({0: [], "a/b": [], "a_b": []}, with_files=False)


# ---- Ranks ----


class Ranks:
    """Threads that stand for ranks; as with real ones, whoever is alone in a collective waits (here: fails)."""

    def __init__(self, world_size):
        self.values = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.current = threading.local()

    def gather_object(self, values):
        self.values[self.current.rank] = values
        self.barrier.wait()
        gathered = [value for rank in self.values for value in rank]
        self.barrier.wait()
        return gathered


class Evaluated:
    """What `evaluate_prompts` asks of a trainer; completions and rewards are functions of the row."""

    def __init__(self, ranks, rank, world_size):
        self.ranks, self.sampled, self.scored = ranks, [], []
        self.accelerator = SimpleNamespace(process_index=rank, num_processes=world_size)
        self.args = SimpleNamespace(
            per_device_eval_batch_size=5,  # two groups at once
            eval_pass_threshold=1.0,
            log_completions=True,
        )
        self.extra_columns = {}
        self.sampling = SimpleNamespace(num_generations=2)
        self.reward_names, self.reward_weights = ["a", "b"], torch.tensor([1.0, 0.5])

    def encode(self, example, draw):
        return Prompt([1], example, draw)

    def sample(self, prompts):
        self.ranks.barrier.wait()  # weights are gathered for a rollout: a collective
        self.sampled.append([prompt.draw for prompt in prompts])
        return [
            Group(prompt, [[7] * (1 + prompt.draw), [7]], [True, prompt.draw % 2 == 0], completions=["x", "y"])
            for prompt in prompts
        ]

    def score(self, groups, metrics):
        self.scored += [(group.prompt.draw, group.prompt.example["id"]) for group in groups]
        for group in groups:
            metrics.add("row", group.prompt.draw)
        return torch.cat(
            [torch.tensor([[float(g.prompt.draw % 3 == 0), 0.1 * g.prompt.draw], [0.0, NONE]]) for g in groups]
        )


def evaluate_on(world_size, num_rows, monkeypatch):
    """The metrics and the table of every rank, and what each sampled and scored."""
    ranks = Ranks(world_size)
    monkeypatch.setattr(evaluation, "gather_object", ranks.gather_object)
    trainers = [Evaluated(ranks, rank, world_size) for rank in range(world_size)]
    rows = [{"id": 100 + row, "prompt": f"row {row}"} for row in range(num_rows)]

    def run(rank):
        ranks.current.rank = rank
        return evaluate_prompts(trainers[rank], rows)

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(run, range(world_size))), trainers


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 9])
@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_rows_over_ranks_give_what_one_rank_gives(num_rows, world_size, monkeypatch):
    ((alone, table),), _ = evaluate_on(1, num_rows, monkeypatch)
    results, trainers = evaluate_on(world_size, num_rows, monkeypatch)
    assert [metrics for metrics, _ in results] == [alone] * world_size  # to the last digit, on every rank
    assert repr(results[0][1]) == repr(table)  # in the order of the dataset; repr: NaN equals NaN
    assert [row["prompt"] for row in table] == [f"row {i // 2}" for i in range(2 * num_rows)]
    assert all(row["advantage"] is None for row in table)
    # every row was scored once, as itself; repeats were sampled only, and by every rank as often
    scored = sorted(pair for trainer in trainers for pair in trainer.scored)
    assert scored == [(row, 100 + row) for row in range(num_rows)]
    assert len({tuple(map(len, trainer.sampled)) for trainer in trainers}) == 1


def test_evaluation_of_five_rows_by_hand(monkeypatch):
    ((result, _), _), trainers = evaluate_on(2, 5, monkeypatch)
    assert [trainer.sampled for trainer in trainers] == [[[0, 2], [4]], [[1, 3], [5]]]
    # rows 0 and 3 pass with their first completion; the second never does
    assert result["pass@2"] == result["rewards/a/pass@2"] == 2 / 5 and result["avg@2"] == 2 / 10
    assert result["rewards/a/mean"] == 2 / 10 and result["rewards/b/mean"] == pytest.approx(0.2)
    assert result["reward"] == pytest.approx((2 + 0.5 * (0 + 0.1 + 0.2 + 0.3 + 0.4)) / 10)
    assert result["completions/mean_length"] == (1 + 2 + 3 + 4 + 5 + 5) / 10
    assert result["completions/clipped_ratio"] == 2 / 10  # the second completions of rows 1 and 3
    assert result["row"] == 2.0  # a metric that a reward function logged: the mean of 0..4


def test_a_stream_is_evaluated_as_a_whole(monkeypatch):
    from datasets import IterableDataset

    ranks = Ranks(1)
    ranks.current.rank = 0
    monkeypatch.setattr(evaluation, "gather_object", ranks.gather_object)
    trainer = Evaluated(ranks, 0, 1)
    rows = [{"id": 100 + i, "prompt": "?"} for i in range(3)]
    evaluate_prompts(trainer, IterableDataset.from_generator(lambda: iter(rows)))
    assert trainer.scored == [(0, 100), (1, 101), (2, 102)]
