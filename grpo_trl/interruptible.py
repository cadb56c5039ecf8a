"""A Trainer that SIGTERM and Ctrl-C stop without loss: it goes back to the last boundary of two steps and saves."""

from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.utils import logging

from . import manifest
from .moment import Moment
from .ranks_exit import pause_at_exit
from .resumable import ResumableTrainer
from .signals import Interruption, SignalWatch, Stopped

logger = logging.get_logger(__name__)


class InterruptibleTrainer(ResumableTrainer):
    """`save_on_signal`. Weights change in updates only, so up to an update a step can be given up.

    One process stops at once, except in an update and while files are written; several stop together before the next
    step or evaluation, since those that stay would wait for the others forever.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.signals = SignalWatch(enabled=False)
        self._moment: Moment | None = None
        self._epoch_has_steps = False  # made here, not before a resume
        self.add_callback(_UpdateCallback(self))
        if self.accelerator.num_processes > 1:
            pause_at_exit()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `ResumableTrainer.train`."""
        self._moment = None
        with SignalWatch(self.args.save_on_signal) as self.signals:
            try:
                return super().train(*args, **kwargs)
            except Interruption:
                self._stop()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next optimizer step: where one step has ended and the next begins."""
        # a resumed run asks for as many more as it left out at the beginning of its epoch, when that is over
        if not (self._epoch_has_steps and self.loader.epoch_is_over):
            self._at_boundary()
        return super().get_batch_samples(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._epoch_has_steps = False
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler:  # before the first step: there is nothing to save yet
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._evaluation_is_due = True
        self._at_boundary()
        metrics = super()._evaluate(trial, ignore_keys_for_eval)
        self.signals.forbid()
        self._evaluation_is_due = False
        return metrics

    def _at_boundary(self) -> None:
        """Nothing of the next step, or of this evaluation, has happened: a signal may stop the run from here on."""
        if not self.signals.active:
            return
        if self.accelerator.num_processes > 1:
            received = torch.tensor(float(self.signals.received is not None), device=self.args.device)
            if self.accelerator.reduce(received, reduction="sum"):
                raise Interruption
            return
        self._moment = Moment.of(self)
        self.signals.allow()

    def _stop(self) -> NoReturn:
        """Saves the state of the last boundary and ends the process."""
        if self._moment is not None:
            self._moment.put_back(self)
        if not self._newest_holds_this_step():
            self._save_is_extra = True
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        assert self._last_checkpoint is not None
        if self.is_world_process_zero():
            logger.warning(
                "Stopped by a signal after optimizer step %d; %s holds everything. Go on with "
                "resume_from_checkpoint=True.",
                *self._last_checkpoint,
            )
        received = self.signals.received or SIGTERM
        raise (Stopped if received == SIGINT else SystemExit)(128 + received) from None

    def _newest_holds_this_step(self) -> bool:
        """Whether resume_from_checkpoint=True would go on from here: not from a checkpoint that was resumed from and
        lies elsewhere, or before others."""
        if self._last_checkpoint is None or self._last_checkpoint[0] != self.state.global_step:
            return False
        newest = manifest.checkpoints(Path(str(self.args.output_dir)))[-1:]
        found = [[folder.resolve() for folder in newest] == [self._last_checkpoint[1].resolve()]]
        broadcast_object_list(found)  # ranks need not see one disk
        return found[0]


class _UpdateCallback(TrainerCallback):
    """From the optimizer's step to the next boundary, signals wait."""

    def __init__(self, trainer: InterruptibleTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.signals.forbid()
        self.trainer._epoch_has_steps = True
