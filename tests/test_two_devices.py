"""Policy on one device, reference and reward model on another: the same results, and only small tensors cross."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `two_devices_run.py` writes."""
    out = tmp_path_factory.mktemp("two-devices") / "results.pt"
    command = [sys.executable, "-m", "tests.two_devices_run", str(out)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    return torch.load(out, weights_only=False)


def crossings(result, source, target):
    return [c for c in result["crossings"] if (c["source"], c["target"]) == (source, target)]


def test_each_model_is_where_it_was_put(results):
    assert results["cpu"]["devices"] == [{"cpu"}] * 3
    assert results["two"]["devices"] == [{"vgpu:0"}, {"vgpu:1"}, {"vgpu:1"}]


def test_rollout_scoring_loss_and_gradient_equal_those_of_one_device(results):
    one, two = results["cpu"], results["two"]
    assert one["batch"].keys() == two["batch"].keys() >= {
        "completion_ids", "advantages", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps",
    }  # fmt: skip
    for name, values in one["batch"].items():  # attention is computed by other operations on each device
        torch.testing.assert_close(two["batch"][name], values, rtol=0, atol=1e-5)
    assert one["batch"]["advantages"].abs().max() > 0.1
    torch.testing.assert_close(two["loss"], one["loss"], rtol=0, atol=1e-5)
    assert one["gradient"].keys() == two["gradient"].keys()
    for name, gradient in one["gradient"].items():
        torch.testing.assert_close(two["gradient"][name], gradient, rtol=0, atol=1e-5)
    assert max(gradient.norm() for gradient in one["gradient"].values()) > 1e-2
    for result in (one, two):
        result["metrics"] = {k: v for k, v in result["metrics"].items() if not k.endswith(("_seconds", "step_time"))}
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-5)


def test_only_ids_go_to_the_frozen_models_and_log_probs_and_rewards_come_back(results):
    batch = results["two"]["batch"]
    rows, group = len(batch["prompt_ids"]), 4
    # each group goes by itself, padded to its own longest
    prompts, completions = (
        batch[f"{name}_mask"].sum(1).view(-1, group).max(1).values.tolist() for name in ("prompt", "completion")
    )
    assert len(set(prompts)) == len(prompts) == 2
    assert not results["cpu"]["crossings"]
    assert not crossings(results["two"], "vgpu:0", "vgpu:1") + crossings(results["two"], "vgpu:1", "vgpu:0")

    ids = crossings(results["two"], "cpu", "vgpu:1")
    assert {c["dtype"] for c in ids} == {torch.int64}
    # ids and masks of prompts and completions, the mask of the loss, the numbers of the groups
    sent = sum(c["num_bytes"] for c in ids if c["shape"][:1] == (group,))
    assert sent == sum(8 * group * (2 * p + 3 * t + 1) for p, t in zip(prompts, completions, strict=True))

    scores = [c for c in crossings(results["two"], "vgpu:1", "cpu") if c["dtype"].is_floating_point]
    assert sum(c["num_bytes"] for c in scores) == 4 * group * sum(completions) + 4 * rows  # log-probs and rewards


def test_nothing_as_large_as_hidden_states_or_logits_crosses(results):
    batch = results["two"]["batch"]
    assert len(results["two"]["crossings"]) > 50
    tokens = sum(batch[name].numel() for name in ("prompt_ids", "completion_ids"))
    assert max(c["num_bytes"] for c in results["two"]["crossings"]) < 2 * 8 * tokens  # hidden states: 4 * 32 * tokens


@pytest.mark.parametrize("way", ["packed", "padded", "logits"])
def test_a_reference_may_be_split_over_devices(results, way):
    one, two = results["split"][way]
    torch.testing.assert_close(two.cpu(), one, rtol=0, atol=1e-5)
    assert one.abs().max() > 1


def test_a_mix_of_devices_is_caught(results):
    assert results["LeavesIdsBehind"].endswith("mixes cpu, vgpu:1")
