"""A Trainer that loses nothing: complete checkpoints, exact resume, and a stop at a signal.

`_state` is what goes to disk beyond transformers' own files; `Moment` what is put back when a run stops in a step.
"""

import json
import time
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from . import checkpoint, manifest
from .config import GRPOConfig
from .loader import RolloutLoader
from .metrics import Metrics
from .moment import Moment
from .policy import FrozenReference, Reference
from .rollouts.dynamic import DynamicSampler
from .signals import Interruption, SignalWatch

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """The checkpoints, the resume and the signals of `GRPOTrainer`; see docs/reliability.md."""

    # narrower than transformers' annotations, which are unions for every kind of trainer
    args: GRPOConfig
    model: Any
    model_wrapped: Any
    lr_scheduler: Any
    loader: RolloutLoader
    reference: Reference | None
    metrics: Metrics
    num_tokens: int
    dynamic_sampler: DynamicSampler
    completions_log: list[dict[str, Any]]
    _sampling_is_exact: bool | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.signals = SignalWatch(enabled=False)
        self._resumed: dict[str, Any] | None = None  # what the checkpoint said, until the run goes on
        self._rng_is_loaded = False
        self._last_checkpoint: tuple[int, Path] | None = None  # step and folder
        self._due: dict[str, bool] = {}  # what of the last step's end is still to be done
        self._in_step = False  # between the beginning of a step and the end of its epoch
        self._earlier_seconds = 0.0  # of training before the resume
        self._moment: Moment | None = None
        self.add_callback(_StepCallback(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As `transformers.Trainer.train`, with complete checkpoints only.

        Args:
            resume_from_checkpoint: a folder, or True: the newest complete checkpoint in `output_dir`.

        Raises:
            ValueError: there is no complete checkpoint; a file of the one that was named is missing or corrupt; or it
                is of a run with another layout of its data.
            SystemExit: SIGTERM or Ctrl-C came (`save_on_signal`), and a checkpoint was saved. Code 128 + signal.
        """
        folder = self._verified(resume_from_checkpoint) if resume_from_checkpoint else None
        self._resumed, self._rng_is_loaded, self._due, self._earlier_seconds = None, False, {}, 0.0
        self._last_checkpoint, self._in_step, self._moment = None, False, None
        with SignalWatch(self.args.save_on_signal) as self.signals:
            try:
                return super().train(folder, trial, ignore_keys_for_eval)
            except Interruption:
                self._stop()

    # ---- Writing ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args, main = self.args, self.args.should_save
        output_dir = Path(self._get_output_dir(trial))
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        if main:
            manifest.set_aside(folder)
        self.accelerator.wait_for_everyone()
        # transformers would rotate and push before the manifest makes the checkpoint complete
        limit, push = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, args.push_to_hub = limit, push
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) != folder and not manifest.is_complete(Path(best)):
            best = self.state.best_model_checkpoint = None  # the leftover of a run that died while it saved
            if main:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if main:
            torch.save(args, folder / TRAINING_ARGS_NAME)  # it was written with the two options off
            manifest.write(folder)
            manifest.drop_aside(folder)
            manifest.rotate(output_dir, limit, [folder, *([Path(best)] if best else [])])
        self.accelerator.wait_for_everyone()
        self._last_checkpoint = (self.state.global_step, folder)
        if push:
            self._push_from_checkpoint(str(folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # private, but the one place where every rank gets the folder and that save_only_model leaves out
        super()._save_optimizer_and_scheduler(output_dir)
        checkpoint.save(output_dir, self.accelerator.process_index, self._state())
        if self.args.sync_ref_model and self.args.should_save:
            checkpoint.save_reference(output_dir, self._synced_reference)

    def _state(self) -> dict[str, Any]:
        """What this rank needs to go on, beyond transformers' own files. Tensors under ["loader"]["buffer"]."""
        rows = json.loads(json.dumps(self.completions_log, default=str))
        return {
            "config": checkpoint.config_values(self.args),
            "loader": self.loader.state_dict(),
            "metrics": self.metrics.state_dict(),
            "num_tokens": self.num_tokens,
            "dynamic_sampling": self.dynamic_sampler.state_dict(),
            "sampling_is_exact": self._sampling_is_exact,
            "completions_log": rows,
            "due": self._due,
            # transformers starts these anew at each `train()`
            "tr_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "initial_step": self._initial_global_step,
            "seconds": self._earlier_seconds + time.time() - self._started,
        }

    # ---- Resuming ----

    def _verified(self, resume: str | bool) -> str:
        """The folder to resume from, found and checked by the main process; the same outcome on every rank."""
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = str(
                    checkpoint.newest(Path(str(self.args.output_dir)))
                    if resume is True
                    else checkpoint.checked(Path(str(resume)))
                )
            except ValueError as error:
                outcome[1] = str(error)
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise ValueError(outcome[1])
        return outcome[0]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_state(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_state(self, folder: str) -> None:
        # rank 0 has a file whatever the number of ranks was, so a change of it is told as such
        of_run = checkpoint.load_numbers(folder, 0)
        self.loader.check_layout(of_run["loader"]["layout"])
        changed = checkpoint.changed_config(of_run["config"], checkpoint.config_values(self.args))
        if changed and self.is_world_process_zero():
            logger.warning(
                "The run goes on with other settings than those of %s, so it is no longer the run that was "
                "interrupted: %s.",
                folder,
                "; ".join(changed),
            )
        state = checkpoint.load(folder, self.accelerator.process_index)
        self.loader.load_state_dict(state["loader"])
        self.metrics.load_state_dict(state["metrics"])
        self.num_tokens = state["num_tokens"]
        self.dynamic_sampler.load_state_dict(state["dynamic_sampling"])
        self._sampling_is_exact = state["sampling_is_exact"]
        self.completions_log = state["completions_log"]
        self._resumed = state
        if self.args.sync_ref_model:
            checkpoint.load_reference(folder, self._synced_reference)
        self._last_checkpoint = (self.state.global_step, Path(folder))

    def _go_on(self) -> None:
        """At the beginning of training: what transformers has just set to zero, and what was left to be done."""
        self._started = time.time()
        if self._resumed is None:
            return
        state, self._resumed = self._resumed, None
        self._tr_loss.fill_(state["tr_loss"])
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = state["last_logged"]
        self._initial_global_step = state["initial_step"]
        self._earlier_seconds = state["seconds"]
        if state["due"]:
            assert self._last_checkpoint is not None
            self._load_rng_state(str(self._last_checkpoint[1]))
            self.control.should_evaluate, self.control.should_save = True, state["due"]["save"]
            epoch = self.state.epoch or 0.0
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, self._started)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # once: an evaluation that was left to be done comes before transformers' own call
        if checkpoint is not None and not self._rng_is_loaded:
            super()._load_rng_state(checkpoint)
            self._rng_is_loaded = True

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self._verified(best)
        super()._load_best_model()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: transformers would take a step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        self._at_boundary()
        self.signals.forbid()
        # with the time before a resume: steps and loss are those of the whole run too
        return super()._finalize_training(trial, num_train_samples, start_time - self._earlier_seconds)

    # ---- Between two steps ----

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next optimizer step: where one step has ended and the next begins."""
        self._at_boundary()
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """At the last step of an epoch, evaluation and checkpoint wait for the end of the epoch: the checkpoint is one
        after all that belongs to it, epoch folder and logs included."""
        control = self.control
        waiting = (control.should_evaluate, control.should_save)
        if self._in_step and (self.loader.epoch_is_over or control.should_training_stop or control.should_epoch_stop):
            control.should_evaluate = control.should_save = False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.control.should_evaluate, self.control.should_save = waiting
        else:
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler:  # eval_on_start: a resumed run has begun before
            return {} if self._last_checkpoint else super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
        self._at_boundary({"evaluate": True, "save": self.control.should_save})
        metrics = super()._evaluate(trial, ignore_keys_for_eval)
        self.signals.forbid()
        self._due = {}
        return metrics

    def _at_boundary(self, due: dict[str, bool] | None = None) -> None:
        """Nothing of the next step, or of this evaluation, has happened: a signal may stop the run from here on."""
        self._due = due or {}
        if not self.signals.active:
            return
        if self.accelerator.num_processes > 1:
            # ranks leave together, or those that stay would wait for the others forever
            received = torch.tensor(float(self.signals.received is not None), device=self.args.device)
            if self.accelerator.reduce(received, reduction="sum"):
                raise Interruption
            return
        self._moment = Moment.of(self)
        self.signals.allow()

    def _stop(self) -> None:
        """Saves the state of the last boundary and ends the process."""
        if self._moment is not None:
            self._moment.put_back(self)
        if self._last_checkpoint is None or self._last_checkpoint[0] != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        assert self._last_checkpoint is not None
        if self.is_world_process_zero():
            logger.warning(
                "Stopped by a signal after optimizer step %d; %s holds everything. Go on with "
                "resume_from_checkpoint=True.",
                *self._last_checkpoint,
            )
        raise SystemExit(128 + (self.signals.received or SIGTERM)) from None

    @property
    def _synced_reference(self) -> nn.Module:
        assert isinstance(self.reference, FrozenReference)
        return self.reference.model


class _StepCallback(TrainerCallback):
    """Tells the trainer where it is."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._go_on()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._in_step = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.signals.forbid()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._in_step = False
