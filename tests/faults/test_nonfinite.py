"""A loss or a gradient that is not finite: the update is skipped, counted, and bounded."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from grpo_trl import GRPOTrainer, nonfinite
from tests.test_trainer import assert_same, logged, trainer, weights


class Spoilt(GRPOTrainer):
    """Makes the loss or a gradient of the updates `spoilt` (from 1) not finite."""

    spoilt: dict[int, str] = {}

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        what = self.spoilt.get(self.state.global_step + 1)
        if what in ("nan", "inf"):
            return loss * float(what)
        if what in ("nan alone", "inf alone"):  # not the gradient
            return loss + float(what.split()[0])
        if what == "gradient":
            next(model.parameters()).register_hook(_once(lambda gradient: gradient * float("nan")))
        return loss


def _once(action):
    calls = []

    def hook(gradient):
        calls.append(1)
        return action(gradient) if len(calls) == 1 else gradient

    return hook


class Kept(TrainerCallback):
    """Weights and moments after each step."""

    def __init__(self, run):
        self.run, self.after = run, {}

    def on_step_end(self, args, state, control, **kwargs):
        moments = copy.deepcopy(self.run.optimizer.state_dict()["state"])
        self.after[state.global_step] = (weights(self.run), moments, self.run.lr_scheduler.get_last_lr())


@pytest.mark.parametrize("what", ["nan", "inf", "nan alone", "inf alone", "gradient"])
def test_the_update_is_skipped_with_weights_and_moments_untouched(tmp_path, what, caplog):
    run = trainer(tmp_path, cls=Spoilt, max_steps=3, num_iterations=1, lr_scheduler_type="linear", weight_decay=0.1)
    run.spoilt = {2: what}
    kept = Kept(run)
    run.add_callback(kept)
    run.train()
    first, second, third = (kept.after[step] for step in (1, 2, 3))
    assert_same(first[0], second[0])
    assert any(not torch.equal(weight, third[0][name]) for name, weight in second[0].items())
    assert first[1].keys() == second[1].keys() and first[1]
    for index, moments in first[1].items():
        assert all(torch.equal(value, second[1][index][name]) for name, value in moments.items())
    assert second[2] < first[2]  # the schedule goes on
    assert logged(run, nonfinite.METRIC) == [0.0, 1.0, 0.0]
    assert "Update 2 is skipped: its loss or gradient is not finite" in caplog.text


def test_one_micro_batch_spoils_its_update_only(tmp_path):
    class OneOfTwo(Spoilt):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(*args, **kwargs) if self.calls == 2 else GRPOTrainer.compute_loss(
                self, *args, **kwargs
            )  # fmt: skip

    run = trainer(tmp_path, cls=OneOfTwo, max_steps=2, num_iterations=1, gradient_accumulation_steps=2)
    run.spoilt = {1: "nan"}
    before = weights(run)
    kept = Kept(run)
    run.add_callback(kept)
    run.train()
    assert_same(before, kept.after[1][0])
    assert logged(run, nonfinite.METRIC) == [1.0, 0.0]


@pytest.mark.parametrize("save_steps", [2, 500])
def test_too_many_in_a_row_end_the_run_and_name_the_checkpoint(tmp_path, save_steps):
    options = {"max_steps": 20, "num_iterations": 1, "save_strategy": "steps", "save_steps": save_steps}
    run = trainer(tmp_path, cls=Spoilt, **options)
    run.spoilt = {2: "nan"} | dict.fromkeys(range(4, 20), "nan")
    kept = Kept(run)
    run.add_callback(kept)
    checkpoint = (
        r"the last checkpoint before them is .*checkpoint-2\." if save_steps == 2 else "no checkpoint was written"
    )
    with pytest.raises(FloatingPointError, match=rf"10 updates in a row, up to update 13\. .*{checkpoint}"):
        run.train()
    assert run.state.global_step == 12  # 2 did not count: 3 was good
    assert_same(kept.after[3][0], weights(run))


def test_another_run_of_the_same_trainer_counts_anew(tmp_path):
    run = trainer(tmp_path, cls=Spoilt, max_steps=12, num_iterations=1)
    run.spoilt = dict.fromkeys(range(1, 12), "nan")
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"up to update 10\."):
            run.train()


def test_a_loss_that_a_run_left_behind_is_not_of_the_next(tmp_path):
    run = trainer(tmp_path, max_steps=1, num_iterations=1)
    run.nonfinite_updates.add_loss(torch.tensor(float("nan")))
    run.train()
    assert logged(run, nonfinite.METRIC) == [0.0]


def test_what_is_not_finite_on_another_rank_is_skipped_on_this_one(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=1, num_iterations=1)
    before = weights(run)
    # the verdict is the one fp32 number that is summed over ranks
    monkeypatch.setattr(run, "all_reduce", lambda x: x + 1 if x.dtype == torch.float32 and not x.ndim else x)
    run.train()
    assert_same(before, weights(run))
    assert logged(run, nonfinite.METRIC) == [1.0]


@pytest.mark.parametrize(("deepspeed", "fp16"), [(True, False), (False, True)])
def test_what_others_skip_by_themselves_is_not_judged_and_no_loss_is_kept(deepspeed, fp16):
    updates = nonfinite.NonFiniteUpdates(
        SimpleNamespace(is_deepspeed_enabled=deepspeed, args=SimpleNamespace(fp16=fp16))
    )
    updates.add_loss(torch.tensor(float("nan"), requires_grad=True))
    assert not updates._losses[0].requires_grad  # nor is its graph
    updates.judge(float("nan"))
    assert not updates.active and not updates._losses


def test_after_a_resume_the_checkpoint_that_was_resumed_is_named(tmp_path):
    options = {"num_iterations": 1, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, max_steps=2, **options).train()
    run = trainer(tmp_path, cls=Spoilt, max_steps=20, **options)
    run.spoilt = dict.fromkeys(range(3, 20), "nan")
    with pytest.raises(FloatingPointError, match=r"up to update 12\. .*is .*checkpoint-2\."):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_without_accidents_is_not_changed(tmp_path, monkeypatch):
    run = trainer(tmp_path / "judged", max_steps=3)
    run.train()
    plain = trainer(tmp_path / "plain", max_steps=3)
    monkeypatch.setattr(plain.nonfinite_updates, "active", False)
    plain.train()
    assert_same(weights(run), weights(plain))
    assert not logged(plain, nonfinite.METRIC)
