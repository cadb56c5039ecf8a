"""The benchmarks run, and their arithmetic is right. The figures themselves need a quiet machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.step_vs_trl import RATIOS, Clock, build_prompts, build_tokenizer, eos_ids, parse, ratios
from tests.conftest import ROOT


def test_prompts_are_the_tokens_that_were_drawn():
    load = parse(["--vocab", "512", "--prompts", "3", "--steps", "2", "--prompt_length", "10,20"])
    rows = build_tokenizer(load)(build_prompts(load))["input_ids"]
    assert len(rows) == 9
    assert {len(ids) for ids in rows} <= set(range(10, 21))
    assert not set(eos_ids(load)) & {i for ids in rows for i in ids}
    assert eos_ids(load)[:3] == [1, 49, 97]


def test_figures_leave_out_the_first_round():
    load = parse(["--steps", "2", "--max_completion_length", "6"])
    clock = Clock(mu=1, device="cpu")
    clock.marks, clock.rollouts, clock.lengths = [0.0, 100.0, 104.0, 110.0], [90.0, 1.0, 3.0], [[6], [2, 6], [4, 4]]
    assert clock.figures(load) == {
        "tokens_per_second": 1.6,  # 16 tokens in 10 seconds
        "round_seconds": 5.0,
        "rollout_seconds": 2.0,
        "rest_seconds": 3.0,
        "mean_completion_length": 4.0,
        "share_at_max_length": 0.25,
    }


def test_missing_rollout_is_an_error():
    clock = Clock(mu=1, device="cpu")
    clock.marks, clock.lengths = [0.0, 1.0, 2.0], [[1], [1]]
    with pytest.raises(RuntimeError, match="fix SIDES"):
        clock.figures(parse(["--steps", "1"]))


def test_ratios_pair_the_repeats():
    def row(side: str, mu: int, value: float) -> dict:
        return {"side": side, "mu": mu} | dict.fromkeys(RATIOS, value)

    rows = [row("trl", 1, 2.0), row("grpo_trl", 1, 6.0), row("trl", 1, 4.0), row("grpo_trl", 1, 4.0), row("trl", 4, 1)]
    assert ratios(rows) == {"mu 1": {name: [3.0, 1.0] for name in RATIOS}}  # mu 4 has one side only


def test_unknown_side_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--sides", "trl,verl"])
    assert "--sides got verl; use trl, grpo_trl" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ci
def test_step_vs_trl_runs_both_sides(tmp_path: Path):
    size = "--hidden 32 --layers 1 --vocab 256 --prompts 2 --num_generations 4 --prompt_length 5,9 --eos_every 8"
    size += " --max_completion_length 16 --mu 1,2"
    output = tmp_path / "results" / "small.json"
    subprocess.run(
        [sys.executable, "benchmarks/step_vs_trl.py", *size.split(), "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=500,
    )
    text = output.read_text()
    result = json.loads(text)
    runs = [(row["mu"], row["side"]) for row in result["measurements"]]
    assert runs == [(1, "trl"), (1, "grpo_trl"), (2, "trl"), (2, "grpo_trl")]
    for row in result["measurements"]:
        assert 1 <= row["mean_completion_length"] <= 16
        assert 0 < row["rollout_seconds"] < row["round_seconds"]
        assert row["peak_memory_mib"] > 100
    peer, ours = result["measurements"][:2]
    for name in RATIOS:
        assert result["ratios"]["mu 1"][name] == [pytest.approx(ours[name] / peer[name], abs=1e-3)]
    assert set(result["versions"]) == {"torch", "transformers", "trl", "grpo_trl"}
    # nothing of this machine but its sizes
    assert not [word for word in (str(ROOT), str(tmp_path), socket.gethostname()) if word in text]
