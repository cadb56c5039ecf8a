"""What `transformers.Trainer` calls and would do otherwise: inputs, counts, the model card."""

import shutil
from pathlib import Path
from typing import Any

from .batch import RolloutBatch
from .disk import disk_errors_named
from .interruptible import InterruptibleTrainer
from .model_card import create_model_card
from .nonfinite import NonFiniteUpdates
from .policy import REFERENCE_ADAPTER


class TrainerHooks(InterruptibleTrainer):
    """A Trainer whose data loader yields `RolloutBatch`es."""

    # tells transformers that the loss is already averaged over the accumulation window: the weights see to it
    loss_is_scaled_for_ga = True
    _tag_names = ["grpo_trl", "grpo"]

    # narrower than transformers' annotations, which are unions for every kind of trainer
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
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
        folder = Path(output_dir or str(self.args.output_dir))
        with disk_errors_named(folder):
            super()._save(output_dir, state_dict)
            # PEFT saves every adapter in a folder of its name; the frozen copy of the start is no result
            shutil.rmtree(folder / REFERENCE_ADAPTER, ignore_errors=True)
            create_model_card(self, folder=folder)  # after PEFT, which writes one without content

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        remedy = (
            f"This checkpoint is incomplete; the last complete one is {self.last_checkpoint or 'none'}. Free space (a "
            "lower save_total_limit, save_only_model, another output_dir) and resume from that one"
        )
        with disk_errors_named(folder, remedy):
            self.create_model_card()  # in output_dir too, as TRL does: a push sends that folder
            super()._save_checkpoint(model, trial)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # private, but the one place between the norm and the optimizer's step
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.nonfinite_updates.judge(grad_norm)
        return grad_norm

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Writes README.md into output_dir: objective with its paper, data, rewards, versions, citation."""
        create_model_card(self, model_name=model_name, dataset_name=dataset_name, tags=tags)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: there are no labels to predict. `evaluate(dataset)` samples and scores."""
        raise ValueError("GRPOTrainer has no predict(): use evaluate(dataset), which samples and scores completions.")
