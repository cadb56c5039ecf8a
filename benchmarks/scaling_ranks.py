"""One rank against two on one machine: what the second brings, what they tell each other, and a model of more ranks.

    python benchmarks/scaling_ranks.py
    python benchmarks/scaling_ranks.py --bandwidth 12.5e9

Each rank has one thread and the same work (weak scaling). Two runs that know nothing of each other, at the same time,
say what two processes cost on this machine anyway.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from common import (
    OURS,
    Load,
    build_prompts,
    describe,
    loads_of,
    parser,
    report,
    save_model,
    trainer_options,
)
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from step_vs_trl import Clock
from transformers import PrinterCallback, TrainerCallback

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "accelerate_configs" / "cpu_two_ranks.yaml"
LAUNCHER = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
# a side -> what starts its processes, once for each
SIDES: dict[str, list[list[str]]] = {"one rank": [[]], "two runs at once": [[], []], "two ranks": [LAUNCHER]}
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier")
COUNTS = ("gradient_bytes", "other_bytes", "gradient_seconds", "waiting_seconds")
RANKS = (1, 2, 4, 8, 16, 64)
HELD_EQUAL = (
    "work of each rank (prompts, completions, micro-batch), one thread for each",
    "weights and objective; two ranks have twice as many prompts, and the second half are those of the second rank",
)


# ---- One process ----


class Traffic(TrainerCallback):
    """Bytes that this rank gives to the others, and the seconds it spends in the exchange.

    Gradients travel while the backward pass goes on, so their seconds are not a loss. In all other exchanges the rank
    stands still until the slowest is there.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.counts = trainer, dict.fromkeys(COUNTS, 0.0)
        self.all_reduce = dist.all_reduce
        for name in COLLECTIVES:  # also those that `all_gather_object` and the like are made of
            counted = self.counted(getattr(dist, name))
            setattr(dist, name, counted)
            setattr(dist.distributed_c10d, name, counted)

    def counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = collective(*args, **kwargs)
            self.counts["waiting_seconds"] += time.perf_counter() - start
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self.counts["other_bytes"] += sum(tensor.nbytes for tensor in given[-1:])  # what is given comes last
            return result

        return call

    def on_train_begin(self, args, state, control, **kwargs):
        if dist.is_initialized():
            self.trainer.model_wrapped.register_comm_hook(None, self.average)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.trainer.args.num_iterations:  # the round to warm up
            self.counts.update(dict.fromkeys(COUNTS, 0.0))

    def average(self, _: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP does with a bucket of gradients, timed."""
        start, gradients = time.perf_counter(), bucket.buffer()
        self.counts["gradient_bytes"] += gradients.nbytes
        gradients.div_(dist.get_world_size())
        work: Any = self.all_reduce(gradients, async_op=True)

        def done(future: Any) -> torch.Tensor:
            self.counts["gradient_seconds"] += time.perf_counter() - start
            return future.value()[0]

        return work.get_future().then(done)


def bandwidth(size: int, rounds: int = 5) -> float | None:
    """Bytes per second of an all-reduce of `size` bytes over the ranks; None: there is one rank."""
    if not dist.is_initialized():
        return None
    tensor = torch.zeros(size // 4)
    dist.all_reduce(tensor)
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(tensor)
    return rounds * exchanged(size, dist.get_world_size()) / (time.perf_counter() - start)


def work(load: Load, folder: str, output: Path) -> None:
    """Trains one rank and writes its figures."""
    from grpo_trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    clock = Clock(load.mu, load.device)
    with tempfile.TemporaryDirectory() as output_dir:
        args = GRPOConfig(output_dir, **trainer_options(load, seed=0), **OURS)
        dataset = Dataset.from_dict({"prompt": build_prompts(load, (load.steps + 1) * args.world_size)})
        trainer = GRPOTrainer(folder, clock.reward, args, dataset, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        traffic = Traffic(trainer)
        trainer.add_callback(traffic)
        size = sum(weight.nbytes for weight in trainer.model.parameters())
        speed = bandwidth(size)
        trainer.train()
    seconds = [end - start for start, end in zip(clock.marks[1:], clock.marks[2:], strict=False)]
    figures = {"round_seconds": seconds, "tokens": [sum(lengths) for lengths in clock.lengths[1:]]}
    counts = {name: value / load.steps for name, value in traffic.counts.items()}
    result = figures | counts | {"bandwidth": speed, "world_size": args.world_size}
    (output / f"{os.getpid()}.json").write_text(json.dumps(result))


# ---- All of them ----


def measure(load: Load, folder: str, launchers: Sequence[list[str]]) -> list[dict[str, Any]]:
    """The figures of every process that the launchers start."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as output:
        worker = [str(Path(__file__)), "--worker", json.dumps([asdict(load), folder, output])]
        started = [
            subprocess.Popen([sys.executable, *launcher, *worker], env=environment, cwd=ROOT) for launcher in launchers
        ]
        if codes := [code for process in started if (code := process.wait())]:
            raise RuntimeError(f"A measurement ended with exit code {codes[0]}; see its output above.")
        return [json.loads(path.read_text()) for path in Path(output).glob("*.json")]


def tokens_per_second(ranks: list[dict[str, Any]]) -> float:
    """Of all ranks together."""
    return sum(sum(rank["tokens"]) for rank in ranks) / max(sum(rank["round_seconds"]) for rank in ranks)


def imbalance(ranks: list[dict[str, Any]]) -> float:
    """Tokens of the fullest rank over the mean of all, on average over the rounds. 1: equal."""
    rounds = list(zip(*(rank["tokens"] for rank in ranks), strict=True))
    return mean(max(tokens) / mean(tokens) for tokens in rounds)


def exchanged(size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `size` bytes (Patarasuk and Yuan, 2009)."""
    return 2 * (ranks - 1) / ranks * size


def expected_max(values: Sequence[float], count: int) -> float:
    """Of so many draws from these values, with repetition."""
    ordered, n = sorted(values), len(values)
    return sum(value * ((i + 1) ** count - i**count) / n**count for i, value in enumerate(ordered))


def predicted(seconds: Sequence[float], gradient_bytes: float, bandwidth: float, ranks: int) -> float:
    """Efficiency of so many ranks: a rank alone over what a round takes when all wait for the slowest and then
    exchange gradients, none of it hidden behind the backward pass.

    Args:
        seconds: rounds of one rank, whose spread is that of the lengths of completions.
        gradient_bytes: that a rank gives into the exchanges of a round.
        bandwidth: bytes per second and rank.
    """
    return mean(seconds) / (expected_max(seconds, ranks) + exchanged(gradient_bytes, ranks) / bandwidth)


def main() -> None:
    arguments = parser(__doc__ or "", "scaling_ranks.json")
    arguments.add_argument("--bandwidth", type=float, help="bytes per second and rank, for the model; else measured")
    arguments.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        values, folder, output = options.worker
        return work(Load(**values | {"prompt_len": tuple(values["prompt_len"])}), folder, Path(output))

    load = replace(next(iter(loads_of(options).values())), prompts=options.prompts or 2, steps=options.steps or 8)
    with tempfile.TemporaryDirectory() as folder:
        save_model(load, folder)
        found = {side: measure(load, folder, launchers) for side, launchers in SIDES.items()}
    ranks = found["two ranks"]
    if [rank["world_size"] for rank in ranks] != [2, 2]:
        raise RuntimeError(f"Expected two processes that know of each other, got {[r['world_size'] for r in ranks]}.")

    speed = {side: tokens_per_second(rows) for side, rows in found.items()}
    seconds, size = found["one rank"][0]["round_seconds"], ranks[0]["gradient_bytes"]
    each = options.bandwidth or min(rank["bandwidth"] for rank in ranks)
    model = {str(count): predicted(seconds, size, each, count) for count in RANKS}
    results = {
        "efficiency": speed["two ranks"] / speed["one rank"] / 2,
        "efficiency_of_two_runs_at_once": speed["two runs at once"] / speed["one rank"] / 2,
        "efficiency_beside_two_runs_at_once": speed["two ranks"] / speed["two runs at once"],
        "token_imbalance": imbalance(ranks),
        **{f"{name}_per_round": mean(rank[name] for rank in ranks) for name in COUNTS},
        "round_seconds": mean(ranks[0]["round_seconds"]),
        "bandwidth": each,
    }
    table = Table("", "", title=f"{load}, per rank", min_width=60)
    for name, value in results.items():
        table.add_row(name, f"{value:,.3f}")
    for count, value in model.items():
        table.add_row(f"model: efficiency of {count} ranks", f"{value:.2f}")
    Console(highlight=False).print(table)
    report(options, {"load": describe(load), **results, "model": model, "measurements": found}, HELD_EQUAL)


if __name__ == "__main__":
    main()
