"""`.ci/run`: its clock."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = (Path(__file__).resolve().parent.parent / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("seconds", "command", "code", "said"),
    [
        (3600, "true", 0, "=== times"),
        (3600, "false", 1, "=== nap failed with exit code 1"),
        (1, "sleep 20", 124, "=== nap failed with exit code 124: out of time"),
        (0, "touch ran", 124, "=== nap failed with exit code 124: out of time"),  # 0 means no limit to `timeout`
    ],
)
def test_no_stage_starts_or_goes_on_after_the_deadline(tmp_path, seconds, command, code, said):
    head, _ = SCRIPT.split('stage "environment"')
    assert "deadline=$((SECONDS + 3600))" in head
    script = tmp_path / ".ci" / "run"
    script.parent.mkdir()
    script.write_text(head.replace("3600", str(seconds)) + f"stage nap {command}\nsummary\n")
    run = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=15)
    assert run.returncode == code and said in run.stdout
    assert not (tmp_path / "ran").exists()
