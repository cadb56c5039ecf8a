"""Running the checks on a trainer, where its training would begin."""

import copy
from math import lcm
from typing import Any

from transformers import TrainerCallback

from ..config import GRPOConfig
from ..trainer import GRPOTrainer
from .checks import CHECKS, Result, result_of
from .trial import Trial

MIN_COMPLETIONS = 8
MAX_GENERATIONS = 4
MICRO_BATCHES = 4  # into which the completions are cut for the check of accumulation


def shortened(args: GRPOConfig, output_dir: str) -> GRPOConfig:
    """A copy for the self-test: one step of at least 8 completions, at most 4 of a prompt, without dropout, whose
    numbers would not repeat; nothing goes to trackers or the Hub, and all files to `output_dir`.

    Raises:
        ValueError: several processes, DeepSpeed or FSDP.
    """
    if args.world_size > 1 or args.deepspeed_plugin is not None or args.fsdp:
        raise ValueError(
            "The self-test runs in one process that holds the whole policy: start `grpo-trl check` by itself, without "
            "accelerate launch, and leave deepspeed and fsdp out of the recipe for it."
        )
    size = min(args.num_generations, MAX_GENERATIONS)
    rows = lcm(size, MICRO_BATCHES)
    rows *= -(-MIN_COMPLETIONS // rows)
    changes: dict[str, Any] = {
        "num_generations": size,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "generation_batch_size": rows,
        "disable_dropout": True,
        "mask_truncated_completions": False,  # shortened ones would all be masked
        "output_dir": output_dir,
        "report_to": [],
        "push_to_hub": False,
        "save_on_signal": False,
        "disable_tqdm": True,
    }
    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def run_checks(trainer: GRPOTrainer) -> tuple[dict[str, Result], Trial]:
    """Every check of `CHECKS` by name, and what they looked at. The trainer's weights stay as they are; it cannot be
    trained afterwards.

    Args:
        trainer: built with `shortened` arguments.

    Raises:
        Whatever `trainer.train()` raises before its first step.
    """
    checks = _Checks(trainer)
    trainer.add_callback(checks)
    try:
        trainer.train()
    except _Done:
        trainer.scorer.close()
    return checks.results, checks.trial


class _Done(Exception):
    """The checks were run; no step is to be taken."""


class _Checks(TrainerCallback):
    """Stands where the first step would: the model is wrapped, checkpointing on and the optimizer made."""

    results: dict[str, Result]
    trial: Trial

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trial = Trial(self.trainer)
        self.results = {check.name: result_of(check, self.trial) for check in CHECKS}
        raise _Done
