"""A rank that dies or stops answering: the other ends with an error, within the time-out. Two real gloo processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = (pytest.mark.slow, pytest.mark.ci)
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "accelerate_configs" / "cpu_two_ranks.yaml"
TIMEOUT = 20  # seconds, `ddp_timeout`
RUN = f"""
import os, signal, sys, time
from tests.test_trainer import trainer

output, fault, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])


def reward(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 2:
        print("reached", rank, flush=True)
        if rank == 1 and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and fault == "raises":
            raise KeyError("no such answer")
        if rank == 1 and fault == "hangs":
            time.sleep(600)
    return [float(len(text)) for text in completions]


trainer(output, rewards=reward, max_steps=6, num_iterations=1, per_device_train_batch_size=4,
        ddp_timeout={TIMEOUT}).train()
"""


def environment(**variables) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


@pytest.mark.parametrize("fault", ["raises", *(pytest.param(fault, marks=SLOW) for fault in ("killed", "hangs"))])
def test_the_other_rank_ends_with_an_error(tmp_path, fault):
    """Without a launcher that would end it from outside."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path), fault], cwd=ROOT, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true", **shared),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert ranks[0].stdout is not None and ranks[1].stdout is not None
        assert any(line == "reached 1\n" for line in ranks[1].stdout)
        start = time.monotonic()
        _, error = ranks[0].communicate(timeout=TIMEOUT + 60)
        assert time.monotonic() - start < TIMEOUT + 30
        assert ranks[0].returncode != 0
        assert "Error" in error.strip().splitlines()[-1], error[-2000:]
        if fault != "hangs":
            ranks[1].wait(30)
            assert ranks[1].returncode == (-signal.SIGKILL if fault == "killed" else 1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
@pytest.mark.ci
def test_the_launcher_ends_with_an_error(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path), "killed"],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=150,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr and "rank: 1" in done.stderr, done.stderr[-3000:]
