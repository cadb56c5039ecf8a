"""Runs that are killed at a named point. `Runs` starts a process that imports everything and forks a child per run.

A point is an event, a pattern for its name and which of those that match: `write checkpoint-4/optimizer.pt 1`. The
child kills itself there by SIGKILL, which no code of it can notice. A file that is being written is left half there.
"""

import fnmatch
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MAX_STEPS = 8
EVENTS = (
    *("on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log", "on_save", "on_epoch_end"),
    "on_train_end",
)


class Runs:
    """Real runs in child processes."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.parent = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.killed_runs"],
            cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, output: Path, point: str | None = None, *, plot: bool = False) -> int:
        """Trains, going on from what `output` holds. Returns the exit code; minus the signal for a killed one.

        plot: draw the metrics, which takes longer than all the rest.
        """
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.parent.stdin.write(json.dumps([str(output), point, plot]) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def close(self) -> None:
        self.parent.communicate()


def serve() -> None:
    """For each line of standard input forks a run and prints its exit code."""
    import matplotlib.pyplot  # noqa: F401  what a run imports, once
    import torch._dynamo  # noqa: F401

    import tests.test_resume  # noqa: F401

    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        output, point, plot = json.loads(line)
        child = os.fork()
        if not child:
            log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                train(Path(output), point, plot)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)


def train(output: Path, point: str | None, plot: bool) -> None:
    """The run: two epochs over a dataset, rollouts that are used twice, a reference that follows the policy, and all
    that is written."""
    import torch

    from grpo_trl import manifest
    from tests.resuming import outcome
    from tests.test_trainer import dataset, trainer

    run = trainer(
        output, data=dataset(4), max_steps=MAX_STEPS, num_iterations=2, logging_steps=3, save_strategy="steps",
        save_steps=2, save_total_limit=2, save_epochs=True, plot_metrics=plot, log_completions=True, beta=0.1,
        num_completions_to_print=0, sync_ref_model=True, ref_model_sync_steps=2, eval_dataset=dataset(1),
        eval_strategy="steps", eval_steps=4, num_generations_eval=2, lr_scheduler_type="cosine",
    )  # fmt: skip
    if point is not None:
        Killer(point).watch(run)
    complete = [path for path in manifest.checkpoints(output) if manifest.is_complete(path)]
    aside = list(output.glob("_checkpoint-*"))
    run.train(resume_from_checkpoint=True if complete or aside else None)
    torch.save(outcome(run), output / "outcome.pt")


class Killer:
    """Ends this process at a point."""

    def __init__(self, point: str):
        self.event, self.pattern, nth = point.split()
        self.left = int(nth)

    def is_now(self, event: str, name: Any) -> bool:
        """Counts an event. Whether it is the one."""
        if event != self.event or not fnmatch.fnmatch(str(name), f"*{self.pattern}"):
            return False
        self.left -= 1
        return not self.left

    def hit(self, event: str, name: Any) -> None:
        """Counts an event, and kills if it is the one."""
        if self.is_now(event, name):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, run: Any) -> None:
        """Makes all events of a run pass through here."""
        import pyarrow.parquet
        import safetensors.torch
        import torch
        from transformers import TrainerCallback

        sys.addaudithook(self._audit)
        self._tear(torch, "save", 1)
        self._tear(safetensors.torch, "serialize_file", 1)
        self._tear(pyarrow.parquet, "write_table", 1)
        self._before(run.scorer, "start")
        for name in ("score", "_reference_logps", "compute_loss", "_evaluate"):
            self._before(run, name)
        events = TrainerCallback()
        for name in EVENTS:
            setattr(events, name, lambda *args, name=name, **kwargs: self.hit("event", name))
        run.add_callback(events)

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
            if self.is_now("write", args[0]):  # the file is there, and empty
                os.close(os.open(args[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
                os.kill(os.getpid(), signal.SIGKILL)
        elif event in ("os.rename", "os.remove", "os.rmdir"):
            self.hit(event.removeprefix("os."), args[0])

    def _tear(self, module: Any, name: str, position: int) -> None:
        """Writers that open their files outside of Python: the file is half there."""
        write = getattr(module, name)

        def torn(*args: Any, **kwargs: Any) -> Any:
            path = args[position]
            now = self.is_now("write", path)
            result = write(*args, **kwargs)
            if now:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, torn)

    def _before(self, target: Any, name: str) -> None:
        call = getattr(target, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.hit("call", name)
            return call(*args, **kwargs)

        setattr(target, name, watched)


if __name__ == "__main__":
    serve()
