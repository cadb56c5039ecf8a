"""Which checkpoint a run is resumed from, and which ones rotation leaves."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from grpo_trl import manifest
from grpo_trl.checkpoint import check_resumable, checked
from tests.test_resume import build
from tests.test_trainer import dataset, logged

OPTIONS = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 4 steps with two checkpoints; to be copied."""
    path = tmp_path_factory.mktemp("trained")
    build(path, max_steps=4, **OPTIONS).train()
    return path


@pytest.fixture
def output(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resumed(output, which=True, **options):
    run = build(output, max_steps=6, **OPTIONS | options)
    run.train(resume_from_checkpoint=which)
    return run


def test_true_takes_the_newest_complete_one_and_names_those_passed_over(output, caplog):
    (output / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    (output / "checkpoint-9").mkdir()
    run = resumed(output)
    assert logged(run, "loss") and run.state.global_step == 6
    (message,) = [record.getMessage() for record in caplog.records if "Passed over" in record.getMessage()]
    assert message.startswith(f"Resuming from {output}/checkpoint-2. Passed over: ")
    assert "checkpoint-4 (optimizer.pt has 4 bytes" in message
    assert "checkpoint-9 (manifest.json is missing: the writing of this checkpoint was interrupted" in message
    assert manifest.is_complete(output / "checkpoint-4")  # written anew


def test_without_a_complete_one_true_is_an_error(output):
    for step in (2, 4):
        (output / f"checkpoint-{step}" / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"has no complete checkpoint: checkpoint-4 \(manifest.json is missing.*Leave"
    ):
        resumed(output)
    with pytest.raises(ValueError, match=r"no complete checkpoint\. Leave resume_from_checkpoint out to start anew"):
        resumed(output / "new")


NAMES = [
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"),
    *("rollout_state_0.json", "rollout_buffer_0.safetensors", "prompt_memory.parquet"),
]


def test_a_file_that_is_corrupt_in_a_checkpoint_that_was_named_is_an_error(output):
    folder = output / "checkpoint-2"
    run = build(output, max_steps=6, **OPTIONS)
    for name in NAMES:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one bit
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: {name} is corrupt"):
            run.train(resume_from_checkpoint=str(folder))
        (folder / name).write_bytes(content)
    run.train(resume_from_checkpoint=str(folder))  # the same object: nothing was begun
    assert run.state.global_step == 6


def test_a_checkpoint_of_weights_alone_is_no_place_to_go_on(tmp_path):
    build(tmp_path, max_steps=2, save_only_model=True, **OPTIONS).train()
    assert manifest.is_complete(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"it holds weights only \(save_only_model\); start from them instead"):
        resumed(tmp_path, str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("named", [False, True])
def test_a_run_killed_while_it_wrote_a_checkpoint_anew_has_the_old_one(output, named):
    folder = output / "checkpoint-4"
    manifest.remove(output / "checkpoint-2")
    manifest.set_aside(folder)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    assert resumed(output, str(folder) if named else True).state.global_step == 6
    assert not list(output.glob("_checkpoint-*"))


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_comes_after_the_manifest_and_keeps_the_best(tmp_path, limit):
    kept = []

    def reward(completions, **kwargs):
        kept.append([path.name for path in manifest.checkpoints(tmp_path) if manifest.is_complete(path)])
        return [float(len(completions) - len(kept))] * len(completions)  # the first evaluation is the best

    run = build(
        tmp_path, max_steps=6, rewards=reward, save_total_limit=limit, eval_dataset=dataset(1), eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True,
        **OPTIONS | {"num_iterations": 1},
    )  # fmt: skip
    run.train()
    assert ["checkpoint-2", "checkpoint-4"] in kept  # the newest beside the best, however few may be kept
    left = [path.name for path in manifest.checkpoints(tmp_path)]
    assert left == (["checkpoint-2"] if limit == 1 else ["checkpoint-2", "checkpoint-6"])  # transformers ends with one
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert all(names for names in kept[4:])  # from the first on there always is one


def test_a_limit_of_one_leaves_the_newest(tmp_path):
    build(tmp_path, max_steps=4, save_total_limit=1, **OPTIONS).train()
    assert [path.name for path in manifest.checkpoints(tmp_path)] == ["checkpoint-4"]
    arguments = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert arguments.save_total_limit == 1  # which transformers must not see while it saves


def test_each_checkpoint_is_pushed(tmp_path, monkeypatch):
    run, pushed = build(tmp_path, max_steps=4, **OPTIONS), []
    run.args.push_to_hub = True
    monkeypatch.setattr(run, "init_hf_repo", lambda **options: None)
    monkeypatch.setattr(run, "_finish_current_push", lambda: None)
    monkeypatch.setattr(run, "_push_from_checkpoint", lambda folder: pushed.append(Path(folder).name))
    run.train()
    assert pushed == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("copied", [False, True])
def test_the_best_is_found_where_output_dir_was_moved_to(tmp_path, copied):
    options = OPTIONS | {
        "num_iterations": 1, "eval_dataset": dataset(1), "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True,
    }  # fmt: skip
    calls = []

    def reward(completions, **kwargs):  # the first evaluation is the best
        calls.append(1)
        return [-float(len(calls))] * len(completions)

    build(tmp_path / "then", max_steps=4, rewards=reward, **options).train()
    (shutil.copytree if copied else shutil.move)(tmp_path / "then", tmp_path / "now")
    run = build(tmp_path / "now", max_steps=4, rewards=reward, **options)
    run.train(resume_from_checkpoint=True)
    assert run.state.best_model_checkpoint == str(tmp_path / "now" / "checkpoint-2")


def test_how_often_to_save_and_log_is_the_resumed_runs(tmp_path):
    build(tmp_path, max_steps=2, **OPTIONS | {"logging_steps": 2}).train()
    run = build(tmp_path, max_steps=4, **OPTIONS | {"save_steps": 1, "logging_steps": 1})
    run.train(resume_from_checkpoint=True)
    assert [path.name for path in manifest.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [2, 3, 4]


def test_a_checkpoint_that_was_set_aside_is_not_passed_over(output):
    for folder in manifest.checkpoints(output):
        manifest.set_aside(folder)
    check_resumable(True, output)
    assert resumed(output, True).state.global_step == 6


def test_a_complete_checkpoint_beside_others_is_read_and_nothing_is_written(output, monkeypatch):
    monkeypatch.setattr(manifest, "recover", lambda folder: pytest.fail("the disk may be read-only"))
    assert checked(output / "checkpoint-2") == output / "checkpoint-2"
