"""What `transformers.Trainer` calls and would do otherwise: inputs, counts, checkpoints, the model card."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from . import checkpoint
from .batch import RolloutBatch
from .callbacks import PROMPT_MEMORY_NAME, read_parquet, write_parquet
from .config import GRPOConfig
from .disk import disk_errors_named
from .loader import RolloutLoader
from .metrics import Metrics
from .model_card import create_model_card
from .nonfinite import NonFiniteUpdates
from .policy import REFERENCE_ADAPTER, FrozenReference, Reference
from .prompt_memory import PromptMemory
from .rollouts.dynamic import DynamicSampler


class TrainerHooks(Trainer):
    """A Trainer whose data loader yields `RolloutBatch`es and whose checkpoints hold what exact resume needs."""

    # tells transformers that the loss is already averaged over the accumulation window: the weights see to it
    loss_is_scaled_for_ga = True
    _tag_names = ["grpo_trl", "grpo"]

    # narrower than transformers' annotations, which are unions for every kind of trainer
    args: GRPOConfig
    model: Any
    model_wrapped: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    loader: RolloutLoader
    reference: Reference | None
    metrics: Metrics
    num_tokens: int
    dynamic_sampler: DynamicSampler
    prompt_memory: PromptMemory
    nonfinite_updates: NonFiniteUpdates

    def _prepare_inputs(self, inputs: RolloutBatch) -> RolloutBatch:
        # transformers would cast every float tensor to DeepSpeed's dtype; log-probs and advantages stay fp32
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: RolloutBatch) -> int:
        """6 x parameters x tokens of this micro-batch."""
        tokens = inputs.prompt_ids.numel() + inputs.completion_ids.numel()
        return 6 * tokens * self.model.num_parameters(exclude_embeddings=True)

    def _track_num_input_tokens(self, inputs: RolloutBatch) -> None:
        self.state.num_input_tokens_seen = self.num_tokens

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        # PEFT saves every adapter in a folder of its name; the frozen copy of the start is no result
        shutil.rmtree(folder / REFERENCE_ADAPTER, ignore_errors=True)
        create_model_card(self, folder=folder)  # after PEFT, which writes one without content

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.create_model_card()  # in output_dir too, as TRL does: a push sends that folder
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with disk_errors_named(folder, self.nonfinite_updates.last_checkpoint):
            super()._save_checkpoint(model, trial)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # private, but the one place between the norm and the optimizer's step
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.nonfinite_updates.judge(grad_norm)
        return grad_norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # private, but the one place that is called with the folder before trainer_state.json makes the checkpoint
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "loader": self.loader.state_dict(),
            "metrics": self.metrics.state_dict(),
            "num_tokens": self.num_tokens,
            "dynamic_sampling": self.dynamic_sampler.state_dict(),
        }
        checkpoint.save(output_dir, self.accelerator.process_index, state)
        if self.args.should_save:  # every rank has the same
            write_parquet(self.prompt_memory.table(), Path(output_dir) / PROMPT_MEMORY_NAME)
        if self.args.sync_ref_model and self.args.should_save:
            checkpoint.save_reference(output_dir, self._synced_reference)

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir is not None:
            state = checkpoint.load(checkpoint_dir, self.accelerator.process_index)
            self.loader.load_state_dict(state["loader"])
            self.metrics.load_state_dict(state["metrics"])
            self.num_tokens = state["num_tokens"]
            self.dynamic_sampler.load_state_dict(state["dynamic_sampling"])
            self.prompt_memory.load_table(read_parquet(Path(checkpoint_dir) / PROMPT_MEMORY_NAME))
            if self.args.sync_ref_model:
                checkpoint.load_reference(checkpoint_dir, self._synced_reference)

    @property
    def _synced_reference(self) -> nn.Module:
        assert isinstance(self.reference, FrozenReference)
        return self.reference.model

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Writes README.md into output_dir: objective with its paper, data, rewards, versions, citation."""
        create_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: there are no labels to predict. `evaluate(dataset)` samples and scores."""
        raise ValueError("GRPOTrainer has no predict(): use evaluate(dataset), which samples and scores completions.")
