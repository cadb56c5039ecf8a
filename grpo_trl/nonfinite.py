"""An update whose loss or gradient is not finite is skipped and counted; too many in a row end the run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_IN_A_ROW = 10  # a batch that overflows is an accident; ten in a row are the state of the run
METRIC = "nonfinite/skipped_updates"


class NonFiniteUpdates(TrainerCallback):
    """Judges each update before the optimizer's step, the same on every rank.

    A skipped update leaves weights and moments as they are; the learning-rate schedule and the data go on. Not with
    fp16, whose gradient scaler skips by itself while it looks for its scale, nor with DeepSpeed, whose engine steps
    inside its backward pass: there the next rollout says that the weights have diverged.

    Args:
        trainer: its `optimizer`, `metrics`, `state`, `args`, `last_checkpoint`, `all_reduce` and what it
            runs on are used.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.active = not trainer.is_deepspeed_enabled and not trainer.args.fp16
        self.in_a_row = 0
        self._before_the_row: Path | None = None  # the last checkpoint then
        self._losses: list[Tensor] = []

    def add_loss(self, loss: Tensor) -> None:
        """Of a micro-batch; judged with the gradient that it is part of."""
        self._losses.append(loss.detach())

    def judge(self, grad_norm: Tensor | float) -> None:
        """Drops the gradients of an update that is not finite on some rank.

        Raises:
            FloatingPointError: it was the last of MAX_IN_A_ROW; names the last checkpoint before them.
        """
        trainer, losses = self.trainer, self._losses
        self._losses = []
        if not self.active:
            return
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else torch.as_tensor(grad_norm)
        values = torch.stack([*losses, norm.to(trainer.args.device)])
        skipped = bool(trainer.all_reduce((~values.isfinite()).any().float()))
        trainer.metrics.add(METRIC, float(skipped))
        if not skipped:
            self.in_a_row = 0
            return
        if not self.in_a_row:
            self._before_the_row = trainer.last_checkpoint
        self.in_a_row += 1
        trainer.optimizer.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        step = trainer.state.global_step + 1
        if self.in_a_row == MAX_IN_A_ROW:
            raise FloatingPointError(self._message(step))
        if trainer.is_world_process_zero():
            logger.warning(
                f"Update {step} is skipped: its loss or gradient is not finite (gradient norm {float(grad_norm)}). "
                f"Weights and moments stay as they were; {MAX_IN_A_ROW} in a row end the run."
            )

    def _message(self, step: int) -> str:
        checkpoint = self._before_the_row
        go_on = (
            f"the last checkpoint before them is {checkpoint}"
            if checkpoint
            else "no checkpoint was written before them"
        )
        return (
            f"The loss or the gradient was not finite in {MAX_IN_A_ROW} updates in a row, up to update {step}. None "
            f"of them changed the weights; {go_on}. Look at loss, kl and importance_ratio of the steps before; lower "
            "learning_rate, max_grad_norm or temperature, or look for NaN in the model (its dtype, its weights)."
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_a_row, self._losses = 0, []
