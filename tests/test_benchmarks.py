"""The benchmarks run, and their arithmetic is right. The figures themselves need a quiet machine."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import common
import pytest
from common import (
    LOADS,
    SHAPES,
    Load,
    build_model,
    build_prompts,
    build_tokenizer,
    check_same_work,
    eos_ids,
    loads_of,
    ratios,
)
from learner_vs_trl import completions_of
from rollout_vs_trl import floor_seconds
from scaling_ranks import expected_max, imbalance, predicted
from step_vs_trl import Clock

from tests.conftest import ROOT

TINY = Load(shape="tiny", prompts=3, prompt_len=(10, 20))


def parse(*words: str) -> dict[str, Load]:
    return loads_of(common.parser("", "x.json").parse_args(words))


def test_named_loads_are_those_of_the_documentation():
    assert LOADS["a"] == Load("small", 8, 8, (100, 200), 128, 0.625, 1)
    assert (LOADS["b"].prompts, LOADS["b"].group, LOADS["b"].mu) == (2, 4, 4)
    assert LOADS["c"].prompt_len == (600, 600) and LOADS["c"].group == 8
    assert (LOADS["d"].group, LOADS["d"].prompt_len, LOADS["d"].raggedness) == (2, (8, 8), 0.0)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert all(f"({name}) {load}" in page for name, load in LOADS.items())


def test_the_command_line_changes_fields_of_all_loads():
    found = parse("--load", "a,d", "--mu", "3", "--prompt-len", "5,9", "--shape", "tiny")
    for name in ("a", "d"):
        assert found[name] == replace(LOADS[name], mu=3, prompt_len=(5, 9), shape="tiny")
    assert parse("--prompt-len", "7")["a"].prompt_len == (7, 7)


def test_prompts_are_the_tokens_that_were_drawn():
    rows = build_tokenizer(TINY)(build_prompts(TINY, 3))["input_ids"]
    assert len(rows) == 9
    assert {len(ids) for ids in rows} <= set(range(10, 21))
    assert not set(eos_ids(TINY)) & {i for ids in rows for i in ids}


@pytest.mark.parametrize("raggedness", [0.2, 0.5, 0.625, 0.9])
def test_eos_ids_make_completions_as_ragged_as_asked(raggedness):
    load = replace(LOADS["a"], raggedness=raggedness)
    p = len(eos_ids(load)) / SHAPES["small"]["vocab_size"]
    mean = (1 - (1 - p) ** 128) / p  # of a geometric length that is cut at 128
    assert mean == pytest.approx(128 * (1 - raggedness), rel=0.05)
    assert eos_ids(replace(load, raggedness=0.0)) == [1]


def test_given_completions_are_a_function_of_the_draw_and_end_with_an_eos():
    rows = [ids for draw in range(50) for ids in completions_of(LOADS["a"], draw)]
    assert rows == [ids for draw in range(50) for ids in completions_of(LOADS["a"], draw)]
    eos = set(eos_ids(LOADS["a"]))
    assert all(ids[-1] in eos and not eos & set(ids[:-1]) for ids in rows)
    assert sum(map(len, rows)) / len(rows) == pytest.approx(48, rel=0.15)
    assert {len(ids) for ids in completions_of(LOADS["d"], 0)} == {64}


def test_figures_are_medians_that_leave_out_the_first_round():
    clock = Clock(mu=1, device="cpu")
    clock.marks, clock.rollouts = [0.0, 100.0, 104.0, 110.0, 210.0], [90.0, 1.0, 3.0, 50.0]
    clock.lengths = [[6], [2, 6], [4, 4], [6, 4]]
    assert clock.figures(Load(steps=3, completion_len=6)) == {
        "tokens_per_second": pytest.approx(8 / 6),  # of 8 in 4, 8 in 6, 10 in 100 seconds
        "round_seconds": 6.0,
        "rollout_seconds": 3.0,
        "rest_seconds": 3.0,
        "mean_completion_length": pytest.approx(26 / 6),
        "share_at_max_length": pytest.approx(2 / 6),
    }


def test_missing_rollout_is_an_error():
    clock = Clock(mu=1, device="cpu")
    clock.marks, clock.lengths = [0.0, 1.0, 2.0], [[1], [1]]
    with pytest.raises(RuntimeError, match="fix SIDES"):
        clock.figures(Load())


def test_ratios_pair_the_repeats():
    rows = [{"side": side, "x": value} for side, value in [("trl", 2.0), ("ours", 6.0), ("trl", 4.0), ("ours", 4.0)]]
    assert ratios(rows, "ours", "trl", ["x"]) == {"x": [3.0, 1.0]}


def test_other_work_is_an_error():
    rows = [{"side": "trl", "tokens": 100.0}, {"side": "grpo_trl", "tokens": 80.0}]
    check_same_work(rows, "tokens", 0.2)
    with pytest.raises(RuntimeError, match="did not do the same work: tokens"):
        check_same_work(rows, "tokens", 0.1)
    check_same_work(rows, "tokens", 0.1, rounding=20.0)


def test_floor_of_a_rollout():
    # Qwen3-0.6B, 8 prompts x 8, prompts of 256, all completions 1024 long: 1.24 s at 4.3 TB/s
    load = Load("qwen3-0.6b", 8, 8, (256, 256), 1024, 0.0, device="cuda")
    assert floor_seconds(load, 1024, 4.3e12) == pytest.approx(1.24, rel=0.02)


def test_the_model_of_more_ranks():
    assert expected_max([1.0, 3.0], 1) == 2.0
    assert expected_max([3.0, 1.0], 2) == pytest.approx((1 + 3 + 3 + 3) / 4)
    assert predicted([1.0, 3.0], 1e9, 1e9, ranks=1) == 1.0
    assert predicted([2.0], 1e9, 1e9, ranks=2) == pytest.approx(2 / 3)  # half of 1 GB each way: a second
    assert predicted([2.0], 1e9, 1e9, ranks=4) == pytest.approx(2 / 3.5)
    assert imbalance([{"tokens": [10, 20]}, {"tokens": [30, 20]}]) == pytest.approx((1.5 + 1) / 2)


SMALL = "--shape tiny --prompts 2 --group 4 --prompt-len 5,9 --completion-len 16 --steps 1"


def run(script: str, output: Path, *options: str) -> dict:
    subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *SMALL.split(), *options, "--output", str(output)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=500,
    )  # fmt: skip
    text = output.read_text()
    # nothing of this machine but its sizes
    assert not [word for word in (str(ROOT), str(output.parent), socket.gethostname()) if word in text]
    result = json.loads(text)
    assert result["command"].startswith(f"python benchmarks/{script}.py --load ")
    assert set(result["versions"]) == {"torch", "transformers", "trl", "grpo_trl"}
    return result["loads"]


@pytest.mark.slow
@pytest.mark.ci
def test_step_vs_trl_runs_both_sides(tmp_path: Path):
    loads = run("step_vs_trl", tmp_path / "results" / "small.json", "--load", "a,b")
    assert list(loads) == ["a", "b"] and loads["b"]["load"]["mu"] == 4
    for result in loads.values():
        peer, ours = result["measurements"]
        assert (peer["side"], ours["side"]) == ("trl", "grpo_trl")
        for row in (peer, ours):
            assert 1 <= row["mean_completion_length"] <= 16
            assert 0 < row["rollout_seconds"] < row["round_seconds"]
            assert row["peak_memory_mib"] > 100
        speed = ours["tokens_per_second"] / peer["tokens_per_second"]
        assert result["ratios"]["tokens_per_second"] == [pytest.approx(speed, abs=1e-3)]


@pytest.mark.slow
@pytest.mark.ci
def test_learner_vs_trl_has_the_same_losses_on_both_sides(tmp_path: Path):
    for result in run("learner_vs_trl", tmp_path / "small.json", "--load", "a,b").values():
        peer, ours = result["measurements"]
        assert peer["tokens"] == ours["tokens"]
        # several updates: their weights, and so their losses, differ by rounding
        assert ours["loss_norm"] == pytest.approx(peer["loss_norm"], rel=1e-4)
        assert ours["loss_norm"] > 0.01


@pytest.mark.slow
def test_memory_plan_is_near_what_is_measured(tmp_path: Path):
    output = tmp_path / "plan.json"
    command = [sys.executable, "benchmarks/memory_plan.py", "--shapes", "lora", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=500)
    row = json.loads(output.read_text())["measurements"]["lora"]
    assert row["ratio"] == pytest.approx(1, abs=0.15)
    assert row["phases"]["update"] == row["planned"] > 2**30
    assert "lora" in output.with_suffix(".md").read_text()


@pytest.mark.slow
def test_demo_vs_trl_trains_both_sides(tmp_path: Path):
    output = tmp_path / "small.json"
    command = [sys.executable, "benchmarks/demo_vs_trl.py", "--steps", "3", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    peer, ours = json.loads(output.read_text())["measurements"]
    assert peer["accuracy_before"] == ours["accuracy_before"]
    assert 0 < ours["accuracy_after"] < 1


@pytest.mark.slow
def test_scaling_ranks_counts_what_two_ranks_exchange(tmp_path: Path):
    output = tmp_path / "small.json"
    command = [sys.executable, "benchmarks/scaling_ranks.py", *SMALL.split(), "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    result = json.loads(output.read_text())
    assert [len(ranks) for ranks in result["measurements"].values()] == [1, 2, 2]
    weights = sum(weight.numel() for weight in build_model(replace(TINY, prompts=2)).parameters())
    assert result["gradient_bytes_per_round"] == 4 * weights  # fp32, each once
    assert 0 < result["other_bytes_per_round"] < 1e5
    assert result["token_imbalance"] >= 1 and 0 < result["efficiency"] < 1.5
    assert list(result["model"].values()) == sorted(result["model"].values(), reverse=True)


@pytest.mark.slow
def test_rollout_vs_trl_runs_all_sides(tmp_path: Path):
    (result,) = run("rollout_vs_trl", tmp_path / "small.json", "--load", "a").values()
    assert [row["side"] for row in result["measurements"]] == ["generate", "continuous_batching", "native"]
    assert {"native / generate", "native / continuous_batching"} <= result.keys()


@pytest.mark.slow
def test_by_phase_divides_a_step_into_its_phases(tmp_path: Path):
    words = ("--load", "b", "--runs", "plain,checkpointing,sequential")
    (result,) = run("by_phase", tmp_path / "small.json", *words).values()
    assert list(result["runs"]) == ["plain", "checkpointing", "sequential"]
    for figures in result["runs"].values():
        seconds = figures["seconds"]
        phases = {"rollout", "waiting for rewards", "reference", "update", "optimizer"}
        assert seconds.keys() - {"old"} == phases | {"the rest", "all"}
        assert all(0 < seconds[name] < seconds["all"] for name in phases)
        assert 2 * 4 <= figures["tokens_per_rollout"] <= 2 * 4 * 16
        assert figures["planned_mib"].keys() == {"rollout", "scoring", "update"} and figures["peak_mib"] == {}
