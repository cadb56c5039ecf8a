import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo_trl.batch import Group, Prompt
from grpo_trl.jsonable import plain
from grpo_trl.metrics import Metrics, completion_rows, record_rollout

NAN = math.nan


def alone(parts):
    """`gather_object` of one process."""
    return parts


def reduce_over_ranks(*ranks):
    """What every rank gets when `gather_object` concatenates the lists of all of them."""
    everything = [metrics.state_dict() for metrics in ranks]
    results = [metrics.reduce(lambda local: everything) for metrics in ranks]
    assert all(result == results[0] for result in results)
    return results[0]


def test_a_mean_is_weighted_by_its_counts():
    metrics = Metrics()
    metrics.add("loss", 6.0, 3)
    metrics.add("loss", torch.tensor(2.0), torch.tensor(1))
    metrics.add_all({"kl": (torch.tensor(1.0), torch.tensor(4)), "loss": (4.0, 2)})
    assert metrics.reduce(alone) == {"loss": 2.0, "kl": 0.25}  # not the mean of 2, 2 and 2


def test_shares_of_a_step_add_up():
    # two micro-batches of a step whose losses add up, then another step
    metrics = Metrics()
    for loss in (0.5, 0.25, 1.0, 0.25):
        metrics.add("policy_loss", loss, 1 / 2)
    assert metrics.reduce(alone) == {"policy_loss": 1.0}


def test_nothing_is_logged_without_a_count():
    metrics = Metrics()
    metrics.add("kl", 0.0, 0)
    metrics.add("kl", torch.tensor(0.0), torch.tensor(0))
    metrics.add_mean("rewards/a/mean", torch.tensor([NAN, NAN]))
    metrics.add_std("rewards/a/std", torch.tensor([NAN, NAN]))
    metrics.add_extreme("completions/min_terminated_length", torch.tensor([]))
    assert metrics.reduce(alone) == {}


def test_values_that_do_not_apply_are_left_out():
    metrics = Metrics()
    metrics.add_mean("reward", torch.tensor([1.0, NAN, 3.0]))
    metrics.add_std("reward_std", torch.tensor([1.0, NAN, 3.0]))
    assert metrics.reduce(alone) == {"reward": 2.0, "reward_std": pytest.approx(math.sqrt(2))}


def test_extremes():
    metrics = Metrics()
    for values in ([3.0, 5.0], [4.0], [7.0, 6.0]):
        for name in ("completions/min_length", "completions/max_length", "clip_ratio/low_min", "clip_ratio/high_max"):
            metrics.add_extreme(name, torch.tensor(values))
    assert metrics.reduce(alone) == {
        "completions/min_length": 3.0,
        "completions/max_length": 7.0,
        "clip_ratio/low_min": 3.0,
        "clip_ratio/high_max": 7.0,
    }


@pytest.mark.parametrize("name", ["rewards/minutes/max_score", "min/length_max", "completions/max_terminated_length"])
def test_the_last_part_of_the_name_decides(name):
    metrics = Metrics()
    metrics.add_extreme(name, torch.tensor([1.0, 2.0]))
    assert metrics.reduce(alone) == {name: 2.0}


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_deviation_is_that_of_all_values(offset):
    values = torch.randn(37, generator=torch.Generator().manual_seed(0)).double() + offset
    metrics = Metrics()
    for part in values.split([1, 20, 16]):
        metrics.add_std("reward_std", part)
    assert metrics.reduce(alone)["reward_std"] == pytest.approx(values.std().item(), rel=1e-6)


def test_a_deviation_of_one_value_is_zero():
    metrics = Metrics()
    metrics.add_std("reward_std", torch.tensor([0.7]))
    assert metrics.reduce(alone) == {"reward_std": pytest.approx(0.0, abs=1e-6)}


def test_ranks_are_pooled():
    values = torch.randn(12, generator=torch.Generator().manual_seed(1))
    one, two = Metrics(), Metrics()
    for metrics, part in ((one, values[:3]), (two, values[3:])):
        metrics.add_mean("reward", part)
        metrics.add_std("reward_std", part)
        metrics.add_extreme("completions/min_length", part)
        metrics.add_extreme("completions/max_length", part)
    # a rank may have nothing to say about a name
    two.add("rewards/b/mean", 2.0, 4)
    two.add_extreme("completions/max_terminated_length", torch.tensor([9.0]))
    one.add("kl", 0.0, 0)
    assert reduce_over_ranks(one, two) == {
        "reward": pytest.approx(values.mean().item()),
        "reward_std": pytest.approx(values.std().item()),
        "completions/min_length": values.min().item(),
        "completions/max_length": values.max().item(),
        "rewards/b/mean": 0.5,
        "completions/max_terminated_length": 9.0,
    }


def test_one_gather_per_log():
    calls = []
    metrics = Metrics()
    for name in "abc":
        metrics.add(name, 1.0)
    metrics.reduce(lambda parts: calls.append(parts) or parts)
    assert len(calls) == 1 and len(calls[0]) == 1
    json.dumps(calls)  # plain numbers: no tensor is pickled


def test_reduce_empties():
    metrics = Metrics()
    metrics.add("loss", 5.0)
    metrics.add_extreme("completions/max_length", torch.tensor([5.0]))
    assert metrics.reduce(alone) == {"loss": 5.0, "completions/max_length": 5.0}
    assert metrics.reduce(alone) == {}
    metrics.add("loss", 1.0)
    assert metrics.reduce(alone) == {"loss": 1.0}


def fill(metrics, values):
    metrics.add_mean("reward", values)
    metrics.add_std("reward_std", values)
    metrics.add_extreme("completions/min_length", values)
    metrics.add_extreme("completions/max_length", values)


def test_state_dict_round_trip():
    first, second = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 3.0, -1.0])
    uninterrupted = Metrics()
    fill(uninterrupted, first)
    saved = json.loads(json.dumps(uninterrupted.state_dict()))  # readable without executing code
    fill(uninterrupted, second)
    resumed = Metrics()
    fill(resumed, torch.tensor([100.0]))  # replaced by what is loaded
    resumed.load_state_dict(saved)
    fill(resumed, second)
    assert resumed.reduce(alone) == uninterrupted.reduce(alone)


# ---- A rollout ----


def group(draw, completions, terminated):
    ids = [list(range(10, 10 + length)) for length in completions]
    texts = [f"text {draw}.{i}" for i in range(len(ids))]
    return Group(Prompt([1, 2], {"prompt": f"prompt {draw}"}, draw), ids, terminated, completions=texts)


GROUPS = [group(0, [2, 4], [True, False]), group(1, [4, 3], [False, True])]
REWARDS_PER_FUNC = torch.tensor([[1.0, NAN], [0.0, NAN], [0.5, 2.0], [0.5, 2.0]])
REWARDS = torch.tensor([1.0, 0.0, 2.5, 2.5])


def test_record_rollout():
    metrics = Metrics()
    record_rollout(metrics, GROUPS, REWARDS_PER_FUNC, REWARDS, REWARDS, ["a", "b"])
    assert metrics.reduce(alone) == {
        "completions/mean_length": 3.25,
        "completions/min_length": 2.0,
        "completions/max_length": 4.0,
        "completions/mean_terminated_length": 2.5,
        "completions/min_terminated_length": 2.0,
        "completions/max_terminated_length": 3.0,
        "completions/clipped_ratio": 0.5,
        "rewards/a/mean": 0.5,
        "rewards/a/std": pytest.approx(REWARDS_PER_FUNC[:, 0].std().item()),
        "rewards/b/mean": 2.0,
        "rewards/b/std": 0.0,
        "reward": 1.5,
        "reward_std": pytest.approx(REWARDS.std().item()),
        "frac_reward_zero_std": 0.5,
    }


def test_groups_are_dead_by_what_is_compared_of_their_rewards():
    metrics = Metrics()
    compared = torch.tensor([1.0, 0.0, 0.7, -0.7])
    record_rollout(metrics, GROUPS, REWARDS_PER_FUNC, REWARDS, compared, ["a", "b"])
    assert metrics.reduce(alone)["frac_reward_zero_std"] == 0


def test_record_rollout_without_a_terminated_completion():
    metrics = Metrics()
    truncated = [group(0, [4, 4], [False, False])]
    record_rollout(
        metrics, truncated, torch.tensor([[NAN], [NAN]]), torch.tensor([NAN, NAN]), torch.tensor([NAN, NAN]), ["a"]
    )
    result = metrics.reduce(alone)
    assert result["completions/clipped_ratio"] == 1.0
    assert not {name for name in result if "terminated" in name or "reward" in name} - {"frac_reward_zero_std"}
    assert all(math.isfinite(value) for value in result.values())


def test_completion_rows():
    rows = completion_rows(
        GROUPS, REWARDS_PER_FUNC, torch.tensor([0.5, -0.5, 0.0, 0.0]), ["a", "b"], {"answer": "wxyz"}
    )
    assert len(rows) == 4
    assert rows[1] == {
        "prompt": "prompt 0",
        "completion": "text 0.1",
        "a": 0.0,
        "b": pytest.approx(NAN, nan_ok=True),
        "advantage": -0.5,
        "answer": "x",
    }
    assert [row["completion"] for row in rows] == ["text 0.0", "text 0.1", "text 1.0", "text 1.1"]


def test_an_update_that_is_not_finite_leaves_the_others_in_the_log():
    metrics = Metrics()
    for total in (2.0, NAN, torch.tensor(math.inf), 4.0):
        metrics.add("kl", total, 2)
    metrics.add("nothing_else", NAN)
    metrics.add_std("reward_std", torch.tensor([1.0, 3.0]))
    assert metrics.copy().state_dict()["sums"]["kl"] == (6.0, 4.0)
    for values in ([NAN], [2.0], [NAN, 1.0]):
        metrics.add_extreme("ratio/max", torch.tensor(values))
    assert metrics.reduce(list) == {"kl": 1.5, "reward_std": pytest.approx(2**0.5), "ratio/max": 2.0}


@pytest.mark.parametrize("name", ["step", "prompt", "completion", "advantage", "a"])
def test_a_second_column_of_a_name_is_refused(name):
    with pytest.raises(ValueError, match=f"would have two columns {name}; call"):
        completion_rows(GROUPS, REWARDS_PER_FUNC, [0.0] * 4, ["a", "b"], {name: "wxyz"})
    with pytest.raises(ValueError, match="would have two columns prompt; call"):
        completion_rows(GROUPS, REWARDS_PER_FUNC, [0.0] * 4, ["a", "prompt"], {})


def test_what_json_does_not_know():
    values = [np.float32(0.5), torch.tensor(3), np.arange(2), Path("a")]
    assert json.loads(json.dumps(values, default=plain)) == [0.5, 3, [0, 1], "a"]
