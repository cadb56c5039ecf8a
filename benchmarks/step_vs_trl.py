"""The whole GRPO step, side by side with TRL: rollout, rewards, reference and updates on the same load.

    python benchmarks/step_vs_trl.py --load a,b,c,d --repeats 3
    python benchmarks/step_vs_trl.py --load a --device cuda --shape qwen3-0.6b --completion-len 1024 --micro-batches 8

Read the ratios; `benchmarks/README.md` says how.
"""

import tempfile
from statistics import mean, median
from typing import Any

from common import (
    OURS,
    Load,
    alternate,
    build_prompts,
    check_same_work,
    describe,
    loads_of,
    module_of,
    now,
    parser,
    peak_memory,
    ratios,
    report,
    show,
    tolerance_of_lengths,
    trainer_options,
)
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

# a side is a module with GRPOTrainer and GRPOConfig -> that trainer's method which samples a rollout, prompts to text
SIDES = {"trl": "_generate", "grpo_trl": "sample"}
RATIOS = ("tokens_per_second", "rollout_seconds", "rest_seconds", "mean_completion_length", "peak_memory_mib")


class Clock(TrainerCallback):
    """When training began and each round ended, and the seconds and completion lengths of each rollout."""

    def __init__(self, mu: int, device: str):
        self.mu, self.device = mu, device
        self.marks, self.rollouts, self.lengths = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks.append(now(self.device))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.mu == 0:
            self.marks.append(now(self.device))

    def time_rollouts(self, trainer: Any, method: str) -> None:
        sample = getattr(trainer, method)

        def timed(*args, **kwargs):
            start = now(self.device)
            result = sample(*args, **kwargs)
            self.rollouts.append(now(self.device) - start)
            return result

        setattr(trainer, method, timed)

    def reward(self, completion_ids: list[list[int]], **kwargs) -> list[float]:
        """The share of even ids: costs nothing and differs within a group. Both sides give it the sampled ids."""
        self.lengths.append([len(ids) for ids in completion_ids])
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    def figures(self, load: Load) -> dict[str, float]:
        """Medians over the rounds, the first left out. A token counts once, however many updates are made on it."""
        counts = {len(self.marks) - 1, len(self.rollouts), len(self.lengths)}
        if counts != {load.steps + 1}:
            raise RuntimeError(
                f"expected {load.steps + 1} rounds, rollouts and reward calls, counted {counts}; fix SIDES."
            )
        seconds = [end - start for start, end in zip(self.marks[1:], self.marks[2:], strict=False)]
        rounds = list(zip(seconds, self.rollouts[1:], self.lengths[1:], strict=True))
        lengths = [length for _, _, rows in rounds for length in rows]
        return {
            "tokens_per_second": median(sum(rows) / total for total, _, rows in rounds),
            "round_seconds": median(seconds),
            "rollout_seconds": median(rollout for _, rollout, _ in rounds),
            "rest_seconds": median(total - rollout for total, rollout, _ in rounds),
            "mean_completion_length": mean(lengths),
            "share_at_max_length": mean(float(length == load.completion_len) for length in lengths),
        }


def measure(load: Load, folder: str, seed: int, side: str) -> dict[str, float]:
    """Trains one side."""
    module, clock = module_of(side), Clock(load.mu, load.device)
    extras = OURS if side == "grpo_trl" else {}
    with tempfile.TemporaryDirectory() as output_dir:
        args = module.GRPOConfig(output_dir, **trainer_options(load, seed), **extras)
        dataset = Dataset.from_dict({"prompt": build_prompts(load, load.steps + 1)})
        trainer = module.GRPOTrainer(folder, clock.reward, args, dataset, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        clock.time_rollouts(trainer, SIDES[side])
        trainer.train()
    return clock.figures(load) | {"peak_memory_mib": peak_memory(load.device)}


def main() -> None:
    options = parser(__doc__ or "", "step_vs_trl.json", loads="a,b,c,d").parse_args()
    results = {}
    for name, load in loads_of(options).items():
        rows = alternate(measure, load, list(SIDES), options.repeats)
        # sampled by chance, so equal in distribution only
        check_same_work(rows, "mean_completion_length", tolerance_of_lengths(load, options.repeats))
        found = ratios(rows, "grpo_trl", "trl", RATIOS)
        show(f"({name}) {load}", found)
        results[name] = {"load": describe(load), "ratios": found, "measurements": rows}
        report(options, {"loads": results})


if __name__ == "__main__":
    main()
