"""A disk that is full while something is written: said as such, and the checkpoint before it still works.

Real runs in a child process: on a tmpfs of a few hundred kB where the system lets us mount one (a mount namespace of
its own; needs root or user namespaces), and everywhere under a limit of the size of a file, which fails in the same
calls.
"""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from grpo_trl.callbacks import plot_metrics, write_parquet
from grpo_trl.disk import disk_errors_named, is_of_the_disk
from tests.test_trainer import trainer

SLOW = (pytest.mark.slow, pytest.mark.ci)
ROOT = Path(__file__).parents[2]
RUN = """
import resource, sys
from tests.test_trainer import trainer
from transformers import TrainerCallback

output, limit = sys.argv[1], int(sys.argv[2])


class FillsUp(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if limit and state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


run = trainer(output, max_steps=8, num_iterations=1, save_strategy="steps", save_steps=2)
run.add_callback(FillsUp())
run.train()
"""


def child(command: list[str], output: Path, limit: int) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(output), str(limit)], cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment
    )


@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(5_000, id="card", marks=SLOW),
        pytest.param(40_000, id="weights"),
        pytest.param(200_000, id="optimizer", marks=SLOW),
    ],
)
def test_the_error_names_the_disk_and_the_run_goes_on_from_the_last_checkpoint(tmp_path, limit):
    done = child([sys.executable, "-c", RUN], tmp_path, limit)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("OSError: [Errno ") and f"{tmp_path}/checkpoint-4 could not be written" in error, error
    assert f"the last complete one is {tmp_path}/checkpoint-2. Free space" in error
    run = trainer(tmp_path, max_steps=4, num_iterations=1)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.state.global_step == 4


@pytest.mark.slow
@pytest.mark.ci
def test_a_tmpfs_that_fills_up(tmp_path):
    mount = "mount -t tmpfs -o size=1400k tmpfs {0} && trap 'cp -r {0} {0}.kept' EXIT; shift; \"$@\""
    namespace = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else []), "sh", "-c"]
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run([*namespace, f"mount -t tmpfs tmpfs {disk}"]).returncode:
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own")
    done = child([*namespace, mount.format(disk), "sh", "-", sys.executable, "-c", RUN], disk, 0)
    assert done.returncode == 1, done.stderr[-2000:]
    error = done.stderr.strip().splitlines()[-1]
    assert "OSError" in error and f"{disk}/checkpoint-" in error and "could not be written" in error, error
    saved = sorted(path.name for path in Path(f"{disk}.kept").glob("checkpoint-*"))
    assert saved[:1] == ["checkpoint-2"] and len(saved) > 1
    run = trainer(tmp_path / "on", max_steps=4, num_iterations=1)
    run.train(resume_from_checkpoint=f"{disk}.kept/checkpoint-2")
    assert run.state.global_step == 4


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("plot.png", lambda path: plot_metrics([{"step": 1, "loss": 0.5}], path)),
        ("rows.parquet", lambda path: write_parquet({"text": [str(n) for n in range(2000)]}, path)),
    ],
)
def test_a_file_is_whole_or_as_it_was_and_the_error_names_it(tmp_path, name, write):
    path = tmp_path / "folder" / name
    write(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=rf"{name} could not be written: .*File too large.* MB are free there\. Free"
        ):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(getattr(errno, code), "?") for code in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS")),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_of_the_disk_are_said_as_one(tmp_path, error, monkeypatch):
    free = {tmp_path: SimpleNamespace(free=3_000_000)}  # the checkpoint's own folder may not exist
    monkeypatch.setattr("grpo_trl.disk.shutil.disk_usage", free.__getitem__)
    said = r"checkpoint-1 could not be written: .*\. 3 MB are free there\. Go on\."
    with pytest.raises(OSError, match=said) as raised, disk_errors_named(tmp_path / "checkpoint-1", "Go on."):
        raise error
    assert raised.value.errno == (getattr(error, "errno", None) or errno.ENOSPC)


def test_the_outermost_speaks_alone(tmp_path):
    said = r"checkpoint-1 could not be written: OSError: \[Errno 28\] full\. \d+ MB are free there\. Go on\.$"
    folder = tmp_path / "new" / "checkpoint-1"
    with (
        pytest.raises(OSError, match=said),
        disk_errors_named(folder, "Go on."),
        disk_errors_named(folder / "rows.parquet"),
    ):
        raise OSError(errno.ENOSPC, "full")


def test_a_model_that_is_saved_at_the_end_says_it_too(tmp_path):
    run = trainer(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"^\[Errno \d+\] {tmp_path} could not be written: "):
            run.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="of another kind"), disk_errors_named(tmp_path / "checkpoint-1"):
        raise RuntimeError("of another kind")
    assert not is_of_the_disk(FileNotFoundError(2, "No such file"))
