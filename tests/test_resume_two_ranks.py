"""Two gloo ranks, cut and resumed, are the two ranks that were not. Real processes."""

import json
import subprocess
import sys

import pytest
import torch

from grpo_trl import manifest
from tests.resuming import differences, history
from tests.test_two_ranks import CONFIG, ROOT, _environment


def launch(output, ranks=2, **options):
    """Trains in child processes; returns the finished one, whatever came of it."""
    output.mkdir(exist_ok=True)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)] if ranks > 1 else []
    command = [sys.executable, *launcher, "tests/train_on_ranks.py", str(output), str(8 // ranks), json.dumps(options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=_environment())


def results(output):
    return {
        "weights": torch.load(output / "weights.pt"),
        "optimizer": torch.load(output / "optimizer.pt"),
        "log": history(json.loads((output / "log.json").read_text())),
    }


@pytest.fixture
def trained(tmp_path):
    def train(name, **options):
        done = launch(tmp_path / name, **options)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return results(tmp_path / name)

    return train


OPTIONS = {
    "plain": {"sync_ref_model": True, "ref_model_sync_steps": 2, "steps_per_generation": 2},
    "dynamic": {
        "dynamic_sampling": True, "dynamic_sampling_filter": "tests.train_on_ranks.odd_draws",
        "max_concurrent_rows": 16, "skip_solved_after": 1, "eval_pass_threshold": 1.5,
    },
    "an adapter, in the second epoch, within a buffer, with accumulation and a schedule": {
        "lora": True, "num_iterations": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "lr_scheduler_type": "cosine", "warmup_steps": 2,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.ci), *list(OPTIONS)[1:]])
def test_two_ranks_cut_in_two_are_the_run(tmp_path, trained, name):
    options = {**OPTIONS[name], "max_steps": 6, "logging_steps": 4}
    expected = trained("straight", save_strategy="steps", save_steps=3, **options)
    saved = tmp_path / "straight" / "checkpoint-3"
    assert manifest.is_complete(saved)
    assert all(manifest.holds(saved, f"rollout_buffer_{rank}.safetensors") for rank in range(2))
    resumed = trained("resumed", save_strategy="no", resume=str(saved), **options)
    assert not differences(expected, resumed)
    refused = launch(tmp_path / "one", ranks=1, save_strategy="no", resume=str(saved), **options)
    message = "ranks: 2 then, 1 now. Each rank holds its own part of a rollout and its own random state."
    assert refused.returncode != 0 and message in refused.stderr


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_after_the_step(tmp_path, trained):
    options = {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 100}
    expected = trained("straight", **options)
    stopped = launch(tmp_path / "cut", kick=3, **options)
    assert stopped.returncode != 0 and "Stopped by a signal after optimizer step 3" in stopped.stderr
    assert manifest.is_complete(tmp_path / "cut" / "checkpoint-3")
    resumed = trained("cut", resume=True, **options)
    assert not differences(expected, resumed)
