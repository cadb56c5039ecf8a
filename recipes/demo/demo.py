"""GRPO in two minutes, without a GPU and without downloads: a policy that forgets the carry learns not to.

    python recipes/demo/demo.py
    python recipes/demo/demo.py --config recipes/demo/demo_seed_style.yaml --seed 1 --learning_rate 5e-5

Any field of `GRPOConfig` can be given on the command line.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from arithmetic import build_tokenizer, carry_of, correct_answer, questions, splits
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from trl import TrlParser
from warm_start import build_policy, greedy_reply, warm_start

from grpo_trl import GRPOConfig, GRPOTrainer

DEFAULT_CONFIG = Path(__file__).with_name("demo.yaml")
RIGHT = "rewards/correct_answer/mean"
console = Console(highlight=False, emoji=False, markup=False)


@dataclass
class Measured:
    """Held-out questions, greedy decoding: accuracy on all of them and on those with a carry, and one reply."""

    accuracy: float
    carry_accuracy: float
    reply: str


@dataclass
class Result:
    before: Measured
    after: Measured
    question: str
    warm_start_seconds: float
    grpo_seconds: float
    history: list[dict[str, Any]]  # the logs of the run

    @property
    def gain(self) -> float:
        """Points of held-out greedy accuracy."""
        return 100 * (self.after.accuracy - self.before.accuracy)


class ShowCurve(TrainerCallback):
    """One bar per log: how many of the sampled answers were right."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and RIGHT in logs:
            console.print(f"  step {state.global_step:3d}  {logs[RIGHT]:4.0%} right  {'█' * round(50 * logs[RIGHT])}")


def parse_config(argv: list[str], default: Path = DEFAULT_CONFIG) -> GRPOConfig:
    argv = argv if "--config" in argv else ["--config", str(default), *argv]
    (args,) = TrlParser(GRPOConfig).parse_args_and_config(argv)  # pyright: ignore[reportArgumentType]
    return args


def run(args: GRPOConfig, reward_funcs: Any = correct_answer, reward_processing_classes: Any = None) -> Result:
    """Warm start, measure, GRPO, measure. `reward_funcs` must contain `correct_answer`, which measures."""
    train, held_out = splits()
    with_carry = [pair for pair in held_out if carry_of(*pair)]
    shown = with_carry[0]

    console.print("Warm start: supervised, most examples forget the carry")
    start = time.perf_counter()
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer, args.seed)
    warm_start(policy, tokenizer, train, seed=args.seed, output_dir=f"{args.output_dir}/warm_start")
    warm_start_seconds = time.perf_counter() - start

    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=questions(train),
        eval_dataset={"all": questions(held_out), "carry": questions(with_carry)},
        processing_class=tokenizer,
        reward_processing_classes=reward_processing_classes,
        callbacks=[ShowCurve()],
    )
    trainer.remove_callback(PrinterCallback)  # the bars instead of every metric

    def measure() -> Measured:
        metrics = trainer.evaluate()
        reply = greedy_reply(policy, tokenizer, shown)
        return Measured(metrics[f"eval_all_{RIGHT}"], metrics[f"eval_carry_{RIGHT}"], reply)

    before = measure()
    console.print(f"GRPO: answers sampled at temperature {args.temperature}")
    start = time.perf_counter()
    trainer.train()
    grpo_seconds = time.perf_counter() - start
    history = [*trainer.state.log_history]
    return Result(before, measure(), "What is {} + {}?".format(*shown), warm_start_seconds, grpo_seconds, history)


def report(result: Result, args: GRPOConfig) -> None:
    before, after = result.before, result.after
    table = Table("right answers", "before GRPO", "after GRPO", title=f"Held-out sums, greedy, seed {args.seed}")
    table.add_row("all", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}", style="bold")
    table.add_row("with a carry", f"{before.carry_accuracy:.1%}", f"{after.carry_accuracy:.1%}")
    console.print(table)
    console.print(f"{result.question}\n  before: {before.reply}\n  after:  {after.reply}")
    console.print(f"\n{result.gain:+.1f} points.")
    if after.carry_accuracy > before.carry_accuracy:
        console.print(
            "What was learnt: to stop forgetting the carry, a bad habit of the warm start. Not addition: that was "
            "there, and the right digit was sampled now and then; the reward made it the usual one."
        )
    console.print(f"\nWarm start {result.warm_start_seconds:.0f} s, GRPO {result.grpo_seconds:.0f} s.")
    console.print(f"Curves: {args.output_dir}/training_metrics.png", soft_wrap=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny tensors gain little from more, and sums of a fixed order make a seed repeatable
    datasets.disable_progress_bars()
    config = parse_config(sys.argv[1:])
    report(run(config), config)
