"""Real runs killed by SIGKILL all over their life and started again end as the run that nothing disturbed."""

import signal

import pytest
import torch

from grpo_trl import manifest
from tests.faults.killed_runs import MAX_STEPS, Runs
from tests.resuming import differences

# Part of .ci/run
SOME = [
    ["call start 3"],  # the second rollout, a group of which is being scored
    ["call compute_loss 4"],  # an update on a rollout that was used before
    ["event on_optimizer_step 3"],  # weights have changed, and no file says so
    ["write checkpoint-4/optimizer.pt 1"],
    ["write checkpoint-4/_manifest.json 1"],  # every file is there
    ["remove checkpoint-2/manifest.json 1"],  # the oldest checkpoint goes
    ["write *training_metrics* 1"],
    ["write _epoch_1/model.safetensors 1"],
]
ALL = [
    *SOME,
    ["call start 1"],  # nothing has been saved
    ["call start 6"],
    ["call score 2"],
    ["call _reference_logps 2"],
    ["call _evaluate 1"],
    ["call compute_loss 7"],
    ["event on_pre_optimizer_step 4"],
    ["event on_step_end 6"],
    ["event on_log 1"],
    ["event on_save 2"],
    ["event on_epoch_end 1"],
    ["event on_train_end 1"],
    ["write checkpoint-2/model.safetensors 1"],  # the first checkpoint
    ["write checkpoint-2/trainer_state.json 1"],
    ["write checkpoint-4/model.safetensors 1"],
    ["write checkpoint-4/config.json 1"],
    ["write checkpoint-4/tokenizer_config.json 1"],
    ["write checkpoint-4/README.md 1"],
    ["write checkpoint-4/scheduler.pt 1"],
    ["write checkpoint-4/rollout_state_0.json 1"],
    ["write checkpoint-6/rollout_buffer_0.safetensors 1"],
    ["write checkpoint-4/*prompt_memory.parquet 1"],
    ["write checkpoint-4/reference.safetensors 1"],
    ["write checkpoint-4/rng_state.pth 1"],
    ["write checkpoint-4/trainer_state.json 1"],
    ["write checkpoint-4/training_args.bin 1"],
    ["write checkpoint-4/training_args.bin 2"],
    ["rename checkpoint-4/_manifest.json 1"],
    ["remove optimizer.pt 1"],  # in the middle of removing the oldest checkpoint
    ["write checkpoint-8/_manifest.json 1"],
    ["rename *training_metrics* 1"],
    ["write completions/*.parquet 1"],
    ["write _epoch_1/recipe.yaml 1"],
    ["rename _epoch_1 1"],
    ["write _epoch_2/model.safetensors 1"],
    # killed again while they made up for it
    ["write checkpoint-4/optimizer.pt 1", "write checkpoint-4/optimizer.pt 1"],
    ["write checkpoint-2/_manifest.json 1", "call start 2", "event on_optimizer_step 3"],
    ["event on_optimizer_step 3", "event on_optimizer_step 3", "remove checkpoint-2/manifest.json 1"],
]
# written once and not changed: compared byte for byte
RESULTS = ("epoch_*/*.safetensors", "epoch_*/recipe.yaml", "completions/*", "*.parquet", "checkpoint-*/*.safetensors")


@pytest.fixture(scope="module")
def runs():
    made = Runs()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    output.mkdir()
    assert runs.start(output) == 0, output.with_suffix(".log").read_text()[-3000:]
    return results(output)


def results(output):
    files = {
        str(path.relative_to(output)): recipe(path) if path.suffix == ".yaml" else path.read_bytes()
        for part in RESULTS
        for path in output.glob(part)
    }
    return torch.load(output / "outcome.pt", weights_only=False), files


def recipe(path):
    """Without what two runs differ in by intention."""
    lines = path.read_text().splitlines()
    return [line for line in lines if not line.startswith(("output_dir:", "plot_metrics:"))]


def identifier(points):
    return ", ".join(points).replace("/", ":")


@pytest.mark.slow
@pytest.mark.parametrize(
    "points",
    [pytest.param(points, marks=[pytest.mark.ci] if points in SOME else [], id=identifier(points)) for points in ALL],
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path, runs, undisturbed, points):
    output = tmp_path / "run"
    output.mkdir()
    plot = any("training_metrics" in point for point in points)
    for point in points:
        assert runs.start(output, point, plot=plot) == -signal.SIGKILL, output.with_suffix(".log").read_text()[-3000:]
        assert not (output / "outcome.pt").exists()
    assert runs.start(output, plot=plot) == 0, output.with_suffix(".log").read_text()[-3000:]
    expected, expected_files = undisturbed
    outcome, files = results(output)
    assert not differences(expected, outcome)
    assert outcome["steps"] == MAX_STEPS and len(outcome["log"]) > 4
    assert files.keys() == expected_files.keys()
    assert [name for name, content in files.items() if content != expected_files[name]] == []
    assert not plot or (output / "training_metrics.png").stat().st_size > 0
    kept = manifest.checkpoints(output)
    assert [path.name for path in kept] == ["checkpoint-6", "checkpoint-8"] and all(map(manifest.is_complete, kept))
    assert not [path for path in output.iterdir() if path.name.startswith("_") and path.is_dir()]
