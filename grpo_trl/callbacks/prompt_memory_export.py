"""`prompt_memory.parquet`: how each prompt has fared, one row each."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .completions import write_parquet

PROMPT_MEMORY_NAME = "prompt_memory.parquet"


class PromptMemoryCallback(TrainerCallback):
    """Writes the trainer's `prompt_memory` into `output_dir`: at checkpoints, ends of epochs, and the end.

    A run that pushes to the Hub writes it under a name that begins with `_`, which a push leaves out: prompts are not
    to be published unasked.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and self.trainer.args.replay_rollouts is None:  # a replay has none
            name = f"_{PROMPT_MEMORY_NAME}" if args.push_to_hub else PROMPT_MEMORY_NAME
            write_parquet(self.trainer.prompt_memory.table(), Path(str(args.output_dir)) / name)

    on_epoch_end = on_save
    on_train_end = on_save
