"""SIGTERM and Ctrl-C in real runs: a checkpoint is saved, the process exits, and the resumed run is the run."""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from grpo_trl import manifest
from grpo_trl.signals import Interruption, SignalWatch
from tests.resuming import differences, outcome
from tests.test_resume import build, some_equal
from tests.test_trainer import config, dataset
from tests.test_trainer import reward_vowels as vowels


def draws(completions, **kwargs):
    noise = random.random() + np.random.rand() + float(torch.rand(()))
    return [noise * value for value in vowels(completions)]


PLAIN = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 100}
OPTIONS = {
    "plain": PLAIN,
    "saved often": PLAIN | {"save_steps": 2, "save_epochs": True},
    "rewards that draw": PLAIN | {"rewards": draws},
    "accumulated": PLAIN | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "prompt memory": PLAIN | {"skip_solved_after": 3},
    "evaluated": PLAIN | {"eval_dataset": dataset(2), "eval_strategy": "steps", "eval_steps": 2},
    "evaluated first": PLAIN | {"eval_dataset": dataset(2), "eval_on_start": True},
    "dynamic sampling": PLAIN | {
        "rewards": some_equal, "data": lambda: dataset(8), "dynamic_sampling": True, "num_iterations": 1,
        "max_concurrent_rows": 16, "steps_per_generation": 2, "beta": 0.0,
    },
}  # fmt: skip


class Kick(TrainerCallback):
    """Sends this process a signal when an event comes for the nth time."""

    def __init__(self, event, nth, signum=signal.SIGTERM):
        self.left, self.signum = nth, signum
        setattr(self, event, self.kick)

    def kick(self, args, state, control, **kwargs):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.signum)


def kick_in_reward(nth, signum=signal.SIGTERM, wait=0.0):
    """A reward that sends a signal in its nth call and then takes its time."""
    calls = []

    def reward_vowels(completions, **kwargs):  # the metrics are named after it
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signum)
            time.sleep(wait)
        return vowels(completions)

    return reward_vowels


def interrupted(run, code=128 + signal.SIGTERM):
    with pytest.raises(SystemExit) as stop:
        run.train(resume_from_checkpoint=True if list(Path(run.args.output_dir).glob("checkpoint-*")) else None)
    assert stop.value.code == code and isinstance(stop.value, KeyboardInterrupt) == (code == 128 + signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was
    return run


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """name of the options -> outcome of the run that nothing disturbs."""

    @cache
    def outcome_of(name):
        run = build(tmp_path_factory.mktemp("straight"), **OPTIONS[name])
        run.train()
        return outcome(run)

    return outcome_of


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_in_a_rollout_the_step_is_given_up_at_once(tmp_path, expected, signum):
    run = build(tmp_path, rewards=kick_in_reward(2, signum, wait=60), **OPTIONS["plain"])
    begin = time.monotonic()
    interrupted(run, 128 + signum)
    assert time.monotonic() - begin < 30
    assert run.state.global_step == 2  # two updates on the first rollout, the second was being scored
    assert manifest.is_complete(tmp_path / "checkpoint-2")
    resumed = build(tmp_path, **OPTIONS["plain"])
    resumed.train(resume_from_checkpoint=True)
    assert not differences(expected("plain"), outcome(resumed))


@pytest.mark.parametrize(
    ("name", "event", "nth", "step"),
    [
        ("plain", "on_step_begin", 3, 2),
        ("plain", "on_pre_optimizer_step", 3, 3),  # the update is made first
        ("plain", "on_optimizer_step", 4, 4),  # the end of an epoch
        ("plain", "on_log", 1, 3),
        ("plain", "on_epoch_end", 1, 4),
        ("saved often", "on_save", 1, 2),
        ("saved often", "on_step_begin", 4, 3),  # a step behind the last checkpoint
        ("accumulated", "on_substep_end", 4, 3),
        ("prompt memory", "on_step_begin", 3, 2),
        ("rewards that draw", "on_step_begin", 3, 2),
        ("dynamic sampling", "on_step_begin", 3, 2),
        ("evaluated", "on_evaluate", 1, 2),
        ("evaluated first", "on_evaluate", 1, 0),
        ("evaluated", "on_step_begin", 4, 3),  # after the evaluation, which is not made again
    ],
)
def test_wherever_it_comes_the_resumed_run_is_the_run(tmp_path, expected, name, event, nth, step):
    run = build(tmp_path, **OPTIONS[name])
    run.add_callback(Kick(event, nth))
    interrupted(run)
    assert run.state.global_step == step and manifest.is_complete(tmp_path / f"checkpoint-{step}")
    resumed = build(tmp_path, **OPTIONS[name])
    resumed.train(resume_from_checkpoint=True)
    assert not differences(expected(name), outcome(resumed))


@pytest.mark.parametrize(("event", "nth"), [("on_optimizer_step", 3), ("on_epoch_end", 1)])
def test_a_resumed_run_ends_its_epoch_before_a_signal_stops_it(tmp_path, event, nth):
    """Resumed after the first of an epoch's four updates."""
    options = PLAIN | {"eval_dataset": dataset(2), "eval_strategy": "epoch", "save_epochs": True}
    first = build(tmp_path, **options)
    first.add_callback(Kick("on_step_begin", 2))
    interrupted(first)
    assert first.state.global_step == 1
    second = build(tmp_path, **options)
    second.add_callback(Kick(event, nth))
    interrupted(second)
    assert second.state.global_step == 4 and (tmp_path / "epoch_1").is_dir()
    resumed = build(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in resumed.state.log_history if "eval_reward" in log] == [4, 6]


def test_an_interrupted_evaluation_is_made_again(tmp_path):
    options = {
        **PLAIN, "num_iterations": 1, "eval_dataset": dataset(2), "eval_strategy": "steps", "eval_steps": 2,
        "save_steps": 2, "metric_for_best_model": "eval_reward", "load_best_model_at_end": True,
    }  # fmt: skip
    straight = build(tmp_path / "straight", **options)
    straight.train()
    expected = outcome(straight)
    # calls: 2 rollouts, then the evaluation after step 2
    run = interrupted(build(tmp_path / "cut", rewards=kick_in_reward(3, wait=60), **options))
    assert run.state.global_step == 2 and not [log for log in run.state.log_history if "eval_reward" in log]
    # once more, in the evaluation that is due
    interrupted(build(tmp_path / "cut", rewards=kick_in_reward(1, wait=60), **options))
    resumed = build(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert not differences(expected, outcome(resumed))
    best = [run.state.best_model_checkpoint.removeprefix(run.args.output_dir) for run in (straight, resumed)]
    assert best[0] == best[1]


@pytest.mark.parametrize(("name", "event", "nth"), [("plain", "on_step_begin", 3), ("saved often", "on_save", 1)])
def test_callbacks_hear_of_the_checkpoint_which_is_written_once(tmp_path, name, event, nth):
    saved = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    run = build(tmp_path, **OPTIONS[name])
    run.add_callback(Watch())
    run.add_callback(Kick(event, nth))
    interrupted(run)
    assert saved == [2]


def test_files_are_written_undisturbed_after_an_evaluation(tmp_path):
    allowed = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            allowed.append(run.signals._allowed)

    run = build(tmp_path, **OPTIONS["evaluated"] | {"save_steps": 2})
    run.add_callback(Watch())
    run.train()
    assert allowed and not any(allowed)


def test_without_the_option_signals_are_what_they_were(tmp_path):
    run = build(tmp_path, rewards=kick_in_reward(1, signal.SIGINT), **PLAIN | {"save_on_signal": False})
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_option_follows_what_is_saved(tmp_path):
    assert config(tmp_path, save_strategy="steps").save_on_signal is True
    assert config(tmp_path, save_strategy="no").save_on_signal is False
    assert config(tmp_path, save_strategy="no", save_on_signal=True).save_on_signal is True
    assert config(tmp_path, save_strategy="steps", save_only_model=True).save_on_signal is False
    with pytest.raises(ValueError, match="save_on_signal saves what a run needs to go on, which save_only_model"):
        config(tmp_path, save_only_model=True, save_on_signal=True)


# ---- The watch ----


def test_a_signal_waits_until_it_is_allowed():
    with pytest.raises(Interruption), SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # changes nothing
        assert watch.received == signal.SIGINT
        watch.allow()


def test_an_allowed_signal_acts_at_once_and_a_forbidden_one_does_not():
    with pytest.raises(Interruption), SignalWatch() as watch:
        watch.allow()
        watch.forbid()
        watch.allow()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not interrupted")


def test_a_second_ctrl_c_is_pythons_own():
    with pytest.raises(KeyboardInterrupt), SignalWatch():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_came_too_late_acts_afterwards():
    watch = SignalWatch()
    with pytest.raises(KeyboardInterrupt), watch:
        os.kill(os.getpid(), signal.SIGINT)
    assert not watch.active


def test_in_another_thread_nothing_is_watched():
    def watched():
        with SignalWatch() as watch:
            return watch.active

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(watched).result() is False


def test_a_watch_that_is_off_leaves_the_handlers():
    former = signal.getsignal(signal.SIGINT)
    with SignalWatch(enabled=False) as watch:
        assert signal.getsignal(signal.SIGINT) is former and not watch.active
        watch.allow()


# ---- Where the checkpoint is, and what it is not ----


@pytest.mark.parametrize("elsewhere", [False, True])
def test_right_after_a_resume_from_another_checkpoint_than_the_newest(tmp_path, elsewhere):
    options = PLAIN | {"save_steps": 2}
    build(tmp_path / "first", max_steps=6, **options).train()
    folder = tmp_path / ("second" if elsewhere else "first")
    run = build(folder, max_steps=6, **options)
    run.add_callback(Kick("on_step_begin", 1))
    with pytest.raises(SystemExit):
        run.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    again = build(folder, max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.last_checkpoint == folder / "checkpoint-2" and again.state.global_step == 2


def test_right_after_a_resume_from_the_newest_nothing_is_written(tmp_path):
    build(tmp_path, max_steps=2, **PLAIN | {"save_steps": 2}).train()
    before = (tmp_path / "checkpoint-2" / manifest.NAME).stat().st_mtime_ns
    run = build(tmp_path, max_steps=4, **PLAIN)
    run.add_callback(Kick("on_step_begin", 1))
    interrupted(run)
    assert (tmp_path / "checkpoint-2" / manifest.NAME).stat().st_mtime_ns == before


def first_is_best():
    calls = []

    def reward(completions, **kwargs):
        calls.append(1)
        return [-float(len(calls))] * len(completions)

    return reward


BEST = {
    "num_iterations": 1, "eval_dataset": dataset(1), "eval_strategy": "steps", "eval_steps": 2, "save_steps": 4,
    "save_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_reward",
    "greater_is_better": True,
}  # fmt: skip


def test_an_evaluation_that_a_signal_broke_off_may_be_the_best(tmp_path):
    options = BEST | {"save_strategy": "best"}
    run = build(tmp_path, max_steps=4, rewards=first_is_best(), **options)
    run.sample = lambda prompts, sample=run.sample: _kick_in_evaluation(run, prompts, sample)
    interrupted(run)
    resumed = build(tmp_path, max_steps=4, rewards=first_is_best(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(("event", "nth"), [("on_step_begin", 3), ("on_prediction_step", 1)])
def test_the_checkpoint_of_a_signal_does_not_become_the_best(tmp_path, event, nth):
    run = build(tmp_path, max_steps=4, rewards=first_is_best(), **BEST)
    if event == "on_prediction_step":  # within the evaluation of step 2, whose step would not be saved
        run.sample = lambda prompts, sample=run.sample: _kick_in_evaluation(run, prompts, sample)
    else:
        run.add_callback(Kick(event, nth))
    interrupted(run)
    assert manifest.is_complete(tmp_path / "checkpoint-2")
    resumed = build(tmp_path, max_steps=4, rewards=first_is_best(), **BEST)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == 2 and resumed.state.best_model_checkpoint is None


def _kick_in_evaluation(run, prompts, sample):
    if run.sampling is run.eval_sampling:
        os.kill(os.getpid(), signal.SIGTERM)
    return sample(prompts)


def test_a_checkpoint_of_an_older_run_does_not_become_the_best(tmp_path):
    build(tmp_path, max_steps=2, num_iterations=1, save_steps=2, save_strategy="steps", seed=7).train()
    run = build(tmp_path, max_steps=4, rewards=first_is_best(), **BEST)
    run.train()
    assert run.state.best_global_step == 2 and run.state.best_model_checkpoint is None
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None and manifest.is_complete(tmp_path / "checkpoint-4")
