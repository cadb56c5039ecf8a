"""The run doctor: each rule provoked and nearly provoked on log histories, and on real tiny runs."""

import logging
import math
import re
from pathlib import Path

import pytest
from transformers import TrainerState

from grpo_trl import GRPOConfig
from grpo_trl.callbacks import RunDoctorCallback, diagnose
from grpo_trl.callbacks.run_doctor import RULES, Course
from tests.test_trainer import dataset, trainer
from tests.tiny import tiny_model

DOCS = Path(__file__).resolve().parent.parent / "docs" / "diagnosis.md"
WEIGHTS = {"accuracy": 1.0, "format": 0.5}
HEALTHY = {
    "loss": 0.01, "learning_rate": 1e-6, "grad_norm": 0.5, "kl": 0.02, "entropy": 0.4, "reward": 0.5,
    "completions/clipped_ratio": 0.1, "completions/mean_length": 100.0, "frac_reward_zero_std": 0.3,
    "sampling/logp_gap": 1e-6, "importance_ratio/first_step_gap": 0.0,
    "rewards/accuracy/mean": 0.4, "rewards/accuracy/std": 0.5, "rewards/format/mean": 0.9, "rewards/format/std": 0.2,
}  # fmt: skip


def history(length=20, **changes):
    """Logs of `length` steps; a change is a value, a function of the share of the run, or None: not logged."""
    rows = []
    for step in range(1, length + 1):
        row = {"step": step, **HEALTHY}
        for key, value in changes.items():
            row[key] = value((step - 1) / max(1, length - 1)) if callable(value) else value
        rows.append({key: value for key, value in row.items() if value is not None})
        rows.append({"step": step, "eval_reward": 0.5})
    return rows


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("args"))

    def make(**options):
        defaults = {"per_device_train_batch_size": 32, "num_iterations": 1, "use_cpu": True, "report_to": "none"}
        return GRPOConfig(folder, **defaults | options)

    return make


def found(rows, args, weights=WEIGHTS):
    return [name if reward is None else f"{name}: {reward}" for name, reward in diagnose(Course(rows, args, weights))]


def late(before, after, at=0.5):
    return lambda share: before if share < at else after


TRUNCATED = {"completions/clipped_ratio": 1.0}
BOTH_CONSTANT = {"rewards/accuracy/std": 0.0, "rewards/format/std": 0.0}
NO_REWARD = dict.fromkeys(key for key in HEALTHY if key == "reward" or key.startswith("rewards/"))

PROVOKED = {
    "EOS never appears": [TRUNCATED],
    "all truncated": [{"completions/clipped_ratio": late(0.2, 1.0)}],
    "length runs away": [
        {"completions/clipped_ratio": late(0.1, 0.7), "completions/mean_length": lambda share: 100 + 200 * share}
    ],
    "length collapses": [{"completions/mean_length": lambda share: 100 - 90 * share}],
    "dead groups": [{"frac_reward_zero_std": 0.95}],
    "constant reward: accuracy": [
        {"rewards/accuracy/mean": 0.0, "rewards/accuracy/std": 0.0},
        {"rewards/accuracy/mean": 0.1, "rewards/accuracy/std": 1e-9},  # a mean that was rounded
        {"rewards/accuracy/mean": -0.1, "rewards/accuracy/std": 1e-9},
    ],
    "drowned rewards: accuracy": [{"rewards/accuracy/std": 50.0}],
    "reward reads a part: accuracy": [{"rewards/accuracy/truncated": 0.25}],
    "ratio is not 1": [{"importance_ratio/first_step_gap": 0.1}, {"importance_ratio/first_step_gap": late(0, 0.1, 1)}],
    "sampler disagrees": [{"sampling/logp_gap": 0.5}],
    "KL runs away": [{"kl": late(0.02, 3.0)}],
    "entropy collapses": [{"entropy": lambda share: 0.4 * (1 - share)}],
    "no gradient": [
        {"grad_norm": 0.0},
        {"grad_norm": 0.0, "frac_reward_zero_std": late(0.3, 1.0, at=1.0)},  # most rollouts had groups to learn from
    ],
    "always clipped": [{"grad_norm": 7.0}],
    "learning rate is 0": [{"learning_rate": 0.0}, {"learning_rate": late(1e-6, 0.0)}],
}
NOT_PROVOKED = {
    "EOS never appears": [{"completions/clipped_ratio": late(1.0, 0.99)}],
    "all truncated": [{"completions/clipped_ratio": late(1.0, 0.9)}],
    "length runs away": [
        {"completions/mean_length": lambda share: 100 + 300 * share},  # growth alone: they still end
        {"completions/clipped_ratio": 0.7},  # truncated from the start: no growth
        {"completions/clipped_ratio": 0.7, "completions/mean_length": lambda share: 100 + 300 * share},
    ],
    "length collapses": [{"completions/mean_length": lambda share: 100 - 60 * share}],
    "dead groups": [
        {"frac_reward_zero_std": 0.7},
        {"frac_reward_zero_std": late(0.5, 0.95, at=1.0)},  # of one rollout
        {"frac_reward_zero_std": 1.0, **BOTH_CONSTANT},  # one cause, said of the rewards
        {"frac_reward_zero_std": 1.0, **NO_REWARD},  # none applied: scoring says so
    ],
    "constant reward: accuracy": [
        {"rewards/accuracy/std": 0.0, "rewards/accuracy/mean": lambda share: share},
        {"rewards/accuracy/std": None, "rewards/accuracy/mean": None},  # it never applied: scoring says so
    ],
    "drowned rewards: accuracy": [
        {"rewards/accuracy/std": 1.0},
        {"rewards/format/std": 0.0, "rewards/format/mean": 1.0},  # constant: nothing to drown
        {"rewards/format/std": 0.04, "rewards/format/mean": 0.998},  # nearly always right: it has been learned
    ],
    "reward reads a part: accuracy": [{"rewards/accuracy/truncated": 0.04}],
    "ratio is not 1": [{"importance_ratio/first_step_gap": 0.005}, {"importance_ratio/first_step_gap": None}],
    "sampler disagrees": [{"sampling/logp_gap": 0.02}, {"sampling/logp_gap": None}],
    "KL runs away": [{"kl": 0.5}, {"kl": late(0.1, 1.5, at=1.0)}, {"kl": None}],
    "entropy collapses": [{"entropy": 0.05}, {"entropy": lambda share: 0.4 - 0.25 * share}],
    "no gradient": [
        {"grad_norm": late(0.0, 0.1)},
        {"grad_norm": 0.0, "frac_reward_zero_std": 1.0},
        {"grad_norm": 0.0, "frac_reward_zero_std": None},  # not enough rollouts yet to tell
    ],
    "always clipped": [{"grad_norm": late(7.0, 0.9, at=0.9)}],
    "learning rate is 0": [{"learning_rate": late(1e-6, 0.0, at=1.0)}],  # the last step of a schedule
}


def cases(table):
    return [pytest.param(name, changes, id=name) for name, rows in table.items() for changes in rows]


@pytest.mark.parametrize(("name", "changes"), cases(PROVOKED))
def test_provoked(args, name, changes):
    assert found(history(**changes), args()) == [name]


@pytest.mark.parametrize(("name", "changes"), cases(NOT_PROVOKED))
def test_not_provoked(args, name, changes):
    assert name not in found(history(**changes), args())


def test_every_rule_has_its_cases():
    rules = {rule.name for rule in RULES}
    assert len(RULES) == len(rules)
    for table in (PROVOKED, NOT_PROVOKED):
        assert {name.split(":")[0] for name in table} == rules


def test_a_healthy_run_is_left_in_peace(args):
    for length in (0, 1, 2, 20):
        assert found(history(length), args()) == []


def test_a_few_completions_prove_nothing(args):
    changes = {"completions/clipped_ratio": 1.0, "frac_reward_zero_std": 1.0, **BOTH_CONSTANT}
    # 8 completions per rollout, 4 optimizer steps each: 64 completions after 32 steps
    small = args(per_device_train_batch_size=8, num_iterations=4)
    assert found(history(31, **changes), small) == []
    assert found(history(32, **changes), small) == [
        "EOS never appears",
        "constant reward: accuracy",
        "constant reward: format",
    ]


def test_logs_without_a_rollout_do_not_hide_the_others(args):
    # two optimizer steps per rollout, each logged: every second log has the rollout's metrics
    rows = history(20, **{"completions/clipped_ratio": 1.0})
    for row in rows:
        if row["step"] % 2 == 0:
            row.pop("completions/clipped_ratio", None)
    assert found(rows, args(num_iterations=2)) == ["EOS never appears"]


def test_what_the_configuration_explains_is_not_said(args):
    assert found(history(**{"rewards/accuracy/std": 50.0}), args(variant="gdpo")) == []
    dynamic = args(dynamic_sampling=True)
    drift = ["ratio is not 1"]
    for carried, names in ((2.0, []), (0.0, drift), (late(0.0, 2.0), []), (late(2.0, 0.0), drift)):
        drifted = history(**{"importance_ratio/first_step_gap": 0.1, "dynamic_sampling/carried": carried})
        assert found(drifted, dynamic) == names
    for carried, names in ((2.0, []), (0.0, ["sampler disagrees"])):
        assert found(history(**{"sampling/logp_gap": 0.85, "dynamic_sampling/carried": carried}), dynamic) == names
    masked = args(mask_truncated_completions=True)
    assert found(history(grad_norm=0.0, **TRUNCATED), masked) == ["EOS never appears"]
    assert found(history(grad_norm=7.0), args(max_grad_norm=0.0)) == []


def test_what_is_well_about_a_reward_is_not_said(args):
    penalty = {"accuracy": 1.0, "soft_overlong": 1.0}
    silent = history(**{"rewards/soft_overlong/mean": 0.0, "rewards/soft_overlong/std": 0.0})
    assert found(silent, args(), penalty) == []
    assert found(silent, args(), {"soft_overlong": 1.0}) == ["constant reward: soft_overlong"]  # nothing else to learn
    one = history(**{"rewards/soft_overlong/mean": -0.01, "rewards/soft_overlong/std": 0.1})
    assert found(one, args(), penalty) == []
    watched = history(**{"rewards/format/mean": 3.0, "rewards/format/std": 0.0})
    assert found(watched, args(), {"accuracy": 1.0, "format": 0.0}) == []
    corrected = args(sampler_correction="token_truncate")
    assert found(history(**{"sampling/logp_gap": 0.4}), corrected) == []
    assert found(history(**{"sampling/logp_gap": 3.0}), corrected) == ["sampler disagrees"]
    assert found(history(**{"sampling/logp_gap": 3.0}), args(sampler_correction="token_truncate", top_k=5)) == []
    offset = history(**{"rewards/accuracy/mean": 8.0, "rewards/format/mean": -300.0, "rewards/format/std": 50.0})
    assert found(offset, args()) == ["drowned rewards: format"]


def test_a_reward_of_negative_weight_drowns_others_too(args):
    rows = history(**{"rewards/format/std": 50.0})
    assert found(rows, args(), {"accuracy": 1.0, "format": -1.0}) == ["drowned rewards: format"]


def test_what_evaluations_log_is_not_of_the_run(args):
    rows = history(kl=None)
    for row in rows[1::2]:
        row["kl"] = 3.0
    assert found(rows, args()) == []


def test_a_sentence_has_the_numbers_and_the_remedy(args):
    rows = history(**{"rewards/accuracy/std": 50.0})
    ((cause, text),) = diagnose(Course(rows, args(), WEIGHTS)).items()
    assert cause == ("drowned rewards", "accuracy")
    assert "'accuracy' drowns the others: its spread times its weight is 50, that of all others together 0.1" in text
    assert "reward_weights" in text and "normalize_then_sum" in text


def test_values_that_are_not_finite_do_no_harm(args):
    assert found(history(**dict.fromkeys(HEALTHY, math.nan)), args()) == []


def say(rows, args, main=True):
    """What the callback does at each log of a history."""
    doctor, state = RunDoctorCallback(WEIGHTS), TrainerState(is_world_process_zero=main)
    for row in rows:
        state.log_history.append(row)
        state.global_step = row["step"]
        doctor.on_log(args, state, None, logs=row)


def diagnoses(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "grpo_trl.callbacks.run_doctor"]


def test_each_cause_is_said_once_and_by_the_main_process(args, caplog):
    rows = history(**{"kl": 3.0, "rewards/accuracy/std": 0.0, "rewards/format/std": 0.0})
    say(rows, args(), main=False)
    assert diagnoses(caplog) == []
    say(rows, args())
    said = diagnoses(caplog)
    assert [re.search(r"step (\d+) \((.*?)\)", text).groups() for text in said] == [
        ("2", "constant reward"),
        ("2", "constant reward"),
        ("2", "KL runs away"),
    ]


def test_the_documentation_lists_the_rules():
    table = re.findall(r"^\| `([^`]+)` \|", DOCS.read_text().split("## The run doctor")[1].split("\n## ")[0], re.M)
    assert table == [rule.name for rule in RULES]


# ---- Real runs ----


def constant(completions, **kwargs):
    return [1.0] * len(completions)


def varied(completions, **kwargs):
    return [float(len(text)) for text in completions]


def run(path, caplog, rewards=varied, **options):
    """The names of the rules that spoke in a run of four optimizer steps."""
    caplog.set_level(logging.WARNING)
    options = {"per_device_train_batch_size": 32, "num_iterations": 1, "max_grad_norm": 100.0} | options
    trainer(path, rewards=rewards, data=dataset(8), **options).train()
    return [re.search(r"\((.*?)\)", text).group(1) for text in diagnoses(caplog)]


def test_a_real_run_that_is_well(tmp_path, caplog):
    assert run(tmp_path, caplog, learning_rate=1e-4, max_completion_length=16, num_iterations=2) == []


def test_real_runs_that_are_not(tmp_path, caplog):
    assert run(tmp_path, caplog, rewards=constant) == ["constant reward"]
    caplog.clear()
    assert run(tmp_path, caplog, learning_rate=0.0) == ["learning rate is 0"]
    caplog.clear()
    assert run(tmp_path, caplog, max_completion_length=1, seed=1)[0] == "EOS never appears"


def test_dropout_in_the_update_is_noticed(tmp_path, caplog):
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    options = {"model": model, "disable_dropout": False, "num_iterations": 2, "learning_rate": 1e-5}
    assert set(run(tmp_path, caplog, **options)) == {"ratio is not 1", "sampler disagrees"}


def test_a_sampler_that_is_not_the_policy_is_noticed(tmp_path, caplog):
    assert run(tmp_path, caplog, learning_rate=1e-5, top_p=0.5)[0] == "sampler disagrees"
