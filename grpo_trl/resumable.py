"""A Trainer that loses nothing: complete checkpoints, and resumed runs that are the run."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging
from trl.trainer.utils import get_config_model_id

from . import checkpoint, manifest
from .callbacks import PROMPT_MEMORY_NAME, read_parquet, write_parquet
from .config import GRPOConfig
from .jsonable import plain, with_text_keys
from .loader import RolloutLoader
from .manifest import ResumeError
from .metrics import Metrics
from .policy import FrozenReference, Reference, causal_lm
from .prompt_memory import PromptMemory
from .rollouts.dynamic import DynamicSampler

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """The checkpoints of `GRPOTrainer` and the way back from them; see docs/reliability.md."""

    # narrower than transformers' annotations, which are unions for every kind of trainer
    args: GRPOConfig
    model: Any
    model_wrapped: Any
    loader: RolloutLoader
    reference: Reference | None
    metrics: Metrics
    num_tokens: int
    dynamic_sampler: DynamicSampler
    prompt_memory: PromptMemory
    completions_log: list[dict[str, Any]]
    reward_names: list[str]
    _sampling_is_exact: bool | None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._resumed: dict[str, Any] | None = None  # what the checkpoint said, until the run goes on
        self._last_checkpoint: tuple[int, Path] | None = None  # of this run: step and folder
        self._evaluation_is_due = False  # the last step's; it was interrupted
        self._earlier_seconds = 0.0  # of training before the resume
        self._saved_steps: set[int] = set()  # with a checkpoint of this run, before a resume too
        self._save_is_extra = False  # a run without a signal would not save here, so it cannot be the best
        self.add_callback(_ResumeCallback(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As `transformers.Trainer.train`, with complete checkpoints only.

        Args:
            resume_from_checkpoint: a folder, or True: the newest complete checkpoint in `output_dir`.

        Raises:
            ResumeError (a ValueError): there is no complete checkpoint; a file of the one that was named is missing or
                corrupt; or it is of a run with other weights, or another layout of its data.
            SystemExit: SIGTERM or Ctrl-C came (`save_on_signal`), and a checkpoint was saved. Code 128 + signal.
                Of Ctrl-C it is a KeyboardInterrupt too.
        """
        folder = self._verified(resume_from_checkpoint) if resume_from_checkpoint else None
        self._resumed = self._last_checkpoint = None
        self._evaluation_is_due, self._earlier_seconds, self._saved_steps = False, 0.0, set()
        self._save_is_extra = False
        return super().train(folder, trial, ignore_keys_for_eval)

    @property
    def last_checkpoint(self) -> Path | None:
        """Folder of this run's newest checkpoint, or of the one that it was resumed from."""
        return self._last_checkpoint[1] if self._last_checkpoint else None

    # ---- Writing ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args, main, best = self.args, self.args.should_save, self.state.best_model_checkpoint
        if not self._save_is_extra:
            self._saved_steps.add(self.state.global_step)
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
        if self.state.best_model_checkpoint != best and self.state.best_global_step not in self._saved_steps:
            self.state.best_model_checkpoint = best  # what transformers found is of another run, or of a signal
            if main:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if main:
            torch.save(args, folder / TRAINING_ARGS_NAME)  # it was written with the two options off
            manifest.write(folder)
            manifest.drop_aside(folder)
            best = self.state.best_model_checkpoint
            manifest.rotate(output_dir, limit, [folder, *([Path(best)] if best else [])])
        self.accelerator.wait_for_everyone()
        self._last_checkpoint = (self.state.global_step, folder)
        if push:
            self._push_from_checkpoint(str(folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # private, but the one place where every rank gets the folder and that save_only_model leaves out
        super()._save_optimizer_and_scheduler(output_dir)
        checkpoint.save(output_dir, self.accelerator.process_index, self._state())
        if self.args.should_save:  # every rank has the same
            write_parquet(self.prompt_memory.table(), Path(output_dir) / PROMPT_MEMORY_NAME)
        if self.args.sync_ref_model:
            checkpoint.save_reference(output_dir, self._synced_reference, write=self.args.should_save)

    def _state(self) -> dict[str, Any]:
        """What this rank needs to go on, beyond transformers' own files. Tensors under ["loader"]["buffer"]."""
        return {
            "config": self._settings(),
            "loader": self.loader.state_dict(),
            "metrics": self.metrics.state_dict(),
            "num_tokens": self.num_tokens,
            "dynamic_sampling": self.dynamic_sampler.state_dict(),
            "sampling_is_exact": self._sampling_is_exact,
            # a reward may have added columns of any kind
            "completions_log": json.loads(json.dumps(with_text_keys(self.completions_log), default=plain)),
            "evaluation_is_due": self._evaluation_is_due,
            "saving_is_due": self.control.should_save,
            "saved_steps": sorted(self._saved_steps),
            # transformers starts these anew at each `train()`
            "tr_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "initial_step": self._initial_global_step,
            "seconds": self._earlier_seconds + time.time() - self._began,
        }

    def _settings(self) -> dict[str, Any]:
        """What changes the run where it is another at a resume."""
        model: Any = self.accelerator.unwrap_model(self.model)
        adapter = model.active_peft_config if isinstance(model, PeftModel) else None
        settings = {} if adapter is None else checkpoint.adapter_values(adapter)
        return checkpoint.config_values(self.args) | {
            "model": get_config_model_id(causal_lm(model).config),
            "model_type": causal_lm(model).config.model_type,
            "dtype": str(model.dtype),
            "adapter": None if adapter is None else str(getattr(adapter.peft_type, "value", adapter.peft_type)),
            "reward functions": self.reward_names,
            **settings,
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
                checkpoint.check_fits(outcome[0], self._settings())
            except ValueError as error:
                outcome[1] = str(error)
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise ResumeError(outcome[1])
        return outcome[0]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_state(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_state(self, folder: str) -> None:
        # rank 0 has a file whatever the number of ranks was, so a change of it is told as such
        then: list[Any] = [None, None]
        if self.is_world_process_zero():  # with save_on_each_node no other machine has that file
            of_run = checkpoint.load_numbers(folder, 0)
            then = [of_run["loader"]["layout"], of_run["config"]]
        layout, config = broadcast_object_list(then)
        self.loader.check_layout(layout)
        now = self._settings()
        changed = checkpoint.changed_config(config, now)
        if changed and self.is_world_process_zero():
            logger.warning(
                "The run goes on with other settings than those of %s, so it is no longer the run that was "
                "interrupted: %s.",
                folder,
                "; ".join(changed),
            )
        state = self._resumed = checkpoint.load(folder, self.accelerator.process_index)
        if self.args.beta and state["loader"]["buffer"] and "ref_per_token_logps" not in state["loader"]["buffer"]:
            raise ResumeError(
                f"beta={self.args.beta} needs log-probabilities of a reference, which the rollout that {folder} is in "
                "the middle of does not have (beta was 0 then). Resume with beta=0, from a checkpoint at the end of a "
                "rollout, or start from the weights (model_name_or_path)."
            )
        self.loader.load_state_dict(state["loader"])
        self.metrics.load_state_dict(state["metrics"])
        self.num_tokens = state["num_tokens"]
        self.dynamic_sampler.load_state_dict(state["dynamic_sampling"])
        self.prompt_memory.load_table(read_parquet(Path(folder) / PROMPT_MEMORY_NAME))
        self._sampling_is_exact = state["sampling_is_exact"]
        self.completions_log = state["completions_log"]
        if self.args.sync_ref_model and config.get("sync_ref_model"):
            checkpoint.load_reference(folder, self._synced_reference)
        self._last_checkpoint = (self.state.global_step, Path(folder))

    def _go_on(self) -> None:
        """At the beginning of training: what transformers has just set to zero, and an evaluation that is due."""
        self._began = time.time()
        if self._resumed is None:
            return
        state, self._resumed = self._resumed, None
        self._tr_loss.fill_(state["tr_loss"])
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = state["last_logged"]
        self._initial_global_step = state["initial_step"]
        self._earlier_seconds = state["seconds"]
        if self._resumes_here():  # else the steps are of another folder
            self._saved_steps = set(state["saved_steps"])
        self.state.compute_steps(self.args, self.state.max_steps)  # or the checkpoint's would go on
        self.state.best_model_checkpoint = self._moved_best()
        if state["evaluation_is_due"]:
            self._load_rng_state(str(self.last_checkpoint))
            # saved anew with what it did to random states and to the best metric; transformers then loads that
            self.control.should_evaluate = self.control.should_save = True
            epoch = self.state.epoch or 0.0
            # with "best", transformers decides after the evaluation
            self._save_is_extra = not state["saving_is_due"] and self.args.save_strategy != "best"
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, self._began)
            self._save_is_extra = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(Path(str(self.state.best_model_checkpoint)))

    def _load_renamed(self, folder: Path) -> None:
        """The weights that transformers saves by other names, or in other pieces, than the model has them (experts,
        GPT-NeoX's head), and so leaves as they are when it loads a checkpoint."""
        if self._saves_by_other_names and (left := checkpoint.weights_left_out(self.model, folder)):
            checkpoint.load_weights(self.model, folder, left)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not self._saves_by_other_names:  # else of what `_load_renamed` loads it would say that it is missing
            super()._issue_warnings_after_load(load_result)

    @property
    def _saves_by_other_names(self) -> bool:
        """As `save_pretrained` does; adapters, FSDP and DeepSpeed load by the names that they save."""
        return not (isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _resumes_here(self) -> bool:
        """Whether the checkpoint that is resumed lies in output_dir."""
        assert self._last_checkpoint is not None
        return self._last_checkpoint[1].resolve().parent == Path(str(self.args.output_dir)).resolve()

    def _moved_best(self) -> str | None:
        """The best checkpoint where it lies now: in output_dir, if it went there with the one that is resumed."""
        assert self._last_checkpoint is not None
        resumed = self._last_checkpoint[1]
        then = json.loads((resumed / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["best_model_checkpoint"]
        beside = None if then is None else resumed.parent / Path(then).name
        return str(beside) if beside is not None and manifest.is_complete(beside) else self.state.best_model_checkpoint

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.last_checkpoint:  # eval_on_start: a resumed run has begun before
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: transformers would take a step more
            self._load_rng_state(str(self.last_checkpoint))
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        # with the time before a resume: steps and loss are those of the whole run too
        return super()._finalize_training(trial, num_train_samples, start_time - self._earlier_seconds)

    @property
    def _synced_reference(self) -> nn.Module:
        assert isinstance(self.reference, FrozenReference)
        return self.reference.model


class _ResumeCallback(TrainerCallback):
    """At the last step of an epoch, evaluation and checkpoint wait for the end of the epoch: the checkpoint is one
    after all that belongs to it. Else a run killed between the two would go on without the epoch's folder and logs."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self._waiting = (False, False)

    def on_train_begin(self, args, state, control, **kwargs):
        self._waiting = (False, False)
        self.trainer._go_on()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.loader.epoch_is_over or control.should_training_stop or control.should_epoch_stop:
            self._waiting = (control.should_evaluate, control.should_save)
            control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate |= self._waiting[0]
        control.should_save |= self._waiting[1]
        self._waiting = (False, False)
