"""The learner alone, side by side with TRL: reference, old log-probabilities and updates on given completions.

    python benchmarks/learner_vs_trl.py --load a,b,c,d --steps 2 --repeats 3

Both sides are handed the same completions and rewards, so their losses must be equal; the script checks it.
"""

import random
import tempfile
from statistics import median
from typing import Any

from common import (
    HELD_EQUAL,
    OURS,
    SHAPES,
    Load,
    alternate,
    body_parameters,
    build_prompts,
    check_same_work,
    describe,
    eos_ids,
    loads_of,
    matrix_rate,
    module_of,
    now,
    parser,
    peak_memory,
    ratios,
    report,
    show,
    trainer_options,
)
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

RATIOS = ("tokens_per_second", "seconds", "peak_memory_mib")


def completions_of(load: Load, draw: int) -> list[list[int]]:
    """A group of completions of the load's lengths, a function of the draw."""
    rng = random.Random(draw)
    eos = set(eos_ids(load))
    words = [i for i in range(2, 400) if i not in eos]
    mean = load.completion_len * (1 - load.raggedness)
    lengths = [min(load.completion_len, 1 + int(rng.expovariate(1 / mean))) for _ in range(load.group)]
    if load.raggedness == 0:
        lengths = [load.completion_len] * load.group
    return [[*rng.choices(words, k=length - 1), min(eos)] for length in lengths]


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The share of even ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Clock(TrainerCallback):
    """Seconds from the end of each rollout to the end of its last update, and the losses."""

    def __init__(self, load: Load):
        self.load, self.rollout_ends, self.round_ends, self.losses, self.tokens = load, [], [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.load.mu == 0:
            self.round_ends.append(now(self.load.device))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def figures(self) -> dict[str, float]:
        """Medians over the rounds, the first left out."""
        rounds = list(zip(self.rollout_ends, self.round_ends, self.tokens, strict=True))[1:]
        return {
            "tokens_per_second": median(tokens / (end - start) for start, end, tokens in rounds),
            "seconds": median(end - start for start, end, _ in rounds),
            "tokens": float(sum(self.tokens)),
            # of all updates; the objective is about 0 in each, so squares
            "loss_norm": sum(loss**2 for loss in self.losses) ** 0.5,
        }


def trl_trainer(module: Any, folder: str, args: Any, dataset: Dataset, clock: Clock) -> Any:
    """TRL's trainer with a `rollout_func`, which is given every prompt as often as it has completions."""
    load = clock.load

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        draws = [dataset["prompt"].index(prompt) for prompt in prompts[:: load.group]]
        completions = [ids for draw in draws for ids in completions_of(load, draw)]
        clock.tokens.append(sum(map(len, completions)))
        clock.rollout_ends.append(now(clock.load.device))
        prompt_ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    return module.GRPOTrainer(folder, reward, args, dataset, callbacks=[clock], rollout_func=rollout)


def our_trainer(module: Any, folder: str, args: Any, dataset: Dataset, clock: Clock) -> Any:
    """Ours with `rollout` overridden."""
    load = clock.load

    class Given(module.GRPOTrainer):
        def rollout(self, prompts: list[Any]) -> list[Any]:
            completions = [completions_of(load, dataset["prompt"].index(p.example["prompt"])) for p in prompts]
            clock.tokens.append(sum(len(ids) for group in completions for ids in group))
            clock.rollout_ends.append(now(clock.load.device))
            return [
                module.Group(prompt, ids, [True] * len(ids)) for prompt, ids in zip(prompts, completions, strict=True)
            ]

    return Given(folder, reward, args, dataset, callbacks=[clock])


SIDES = {"trl": trl_trainer, "grpo_trl": our_trainer}


def measure(load: Load, folder: str, seed: int, side: str) -> dict[str, float]:
    """Trains one side."""
    module, clock = module_of(side), Clock(load)
    extras = OURS if side == "grpo_trl" else {}
    options = trainer_options(load, seed) | {
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
    }
    with tempfile.TemporaryDirectory() as output_dir:
        args = module.GRPOConfig(output_dir, **options, **extras)
        dataset = Dataset.from_dict({"prompt": build_prompts(load, load.steps + 1)})
        trainer = SIDES[side](module, folder, args, dataset, clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.figures() | {"peak_memory_mib": peak_memory(load.device)}


def useful_flop(load: Load, tokens: float) -> float:
    """Of a round with so many completion tokens, each prompt once: forward and backward of the policy, forward of the
    reference and of the old log-probabilities where they are needed; products of weights only, attention left out."""
    shape = SHAPES[load.shape]
    passes = 6 * load.mu + 2 + 2 * (load.mu > 1)  # FLOP for each weight and token
    stream = tokens + load.prompts * (sum(load.prompt_len) / 2 - 1)
    return passes * (body_parameters(shape) * stream + shape["vocab_size"] * shape["hidden_size"] * tokens)


def main() -> None:
    options = parser(__doc__ or "", "learner_vs_trl.json", loads="a,b,c,d").parse_args()
    held_equal = (*HELD_EQUAL, "completions and rewards, so also the loss of every update")
    results = {}
    rate = matrix_rate() if options.device == "cuda" else None
    for name, load in loads_of(options).items():
        rows = alternate(measure, load, list(SIDES), options.repeats)
        check_same_work(rows, "tokens", 0.0)
        check_same_work(rows, "loss_norm", 0.01 if load.dtype == "float32" and load.device == "cpu" else 0.2, 1e-6)
        found = ratios(rows, "grpo_trl", "trl", RATIOS)
        show(f"({name}) {load}", found)
        results[name] = {"load": describe(load), "ratios": found, "measurements": rows}
        if rate is not None:
            shares = {
                side: median(
                    useful_flop(load, row["tokens"] / (load.steps + 1)) / row["seconds"] / rate
                    for row in rows
                    if row["side"] == side
                )
                for side in SIDES
            }
            results[name] |= {"matrix_flop_per_second": rate, "share_of_matrix_rate": shares}
            print(f"useful share of {rate / 1e12:.0f} TFLOP/s: {shares}")
        report(options, {"loads": results}, held_equal)


if __name__ == "__main__":
    main()
