"""What the checks look at: a few prompts of the run, completions sampled for them, and what the trainer makes of
these."""

import copy
from dataclasses import replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from ..algorithm import combine_rewards
from ..batch import Group, Prompt, RolloutBatch
from ..policy.loading import is_quantized
from ..rollouts import decode_completions, ordered_groups
from ..trainer import GRPOTrainer

MAX_TOKENS = 64  # of a completion, so that a policy that does not end takes no longer than others


class Trial:
    """Each part is made when a check first asks for it, by the trainer's own methods: a part that fails spoils the
    checks that need it and no other.

    Args:
        trainer: in training, before its first step: wrapped, with checkpointing on and its loader made.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.full_length = trainer.train_sampling.max_completion_length
        self.length = min(self.full_length, MAX_TOKENS)
        trainer.sampling = replace(trainer.train_sampling, max_completion_length=self.length)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The first of the run."""
        return self.trainer.loader.prompts(0)

    @cached_property
    def groups(self) -> list[Group]:
        """Sampled as in training and decoded, but not given to the rewards."""
        trainer = self.trainer
        with trainer.accelerator.autocast():
            groups = ordered_groups(self.prompts, trainer.rollout(self.prompts), trainer.args.num_generations)
        for group in groups:
            group.completions = group.completions or decode_completions(group, trainer.processing_class)
        return groups

    @cached_property
    def batch(self) -> RolloutBatch:
        """Its advantages are those of rewards 0, 1, 2, ... in each group: whether gradients agree should not depend on
        what the rewards say of a few completions."""
        made_up = torch.arange(self.trainer.args.num_generations, dtype=torch.float32).repeat(len(self.groups))
        return self.trainer._batch(self.groups, made_up)

    @cached_property
    def logps(self) -> Tensor:
        """(B, T) of the policy, as the update computes them."""
        return self.trainer._policy_logps(self.batch)

    @cached_property
    def ref_logps(self) -> Tensor | None:
        """(B, T) of the reference; None without KL term."""
        batch = copy.copy(self.batch)
        self.trainer._reference_logps(batch)
        return batch.ref_per_token_logps

    @cached_property
    def rewards_per_func(self) -> Tensor:
        """(B, F); NaN: not applicable."""
        return self.trainer.score(self.groups, self.trainer.metrics)

    @cached_property
    def rewards(self) -> Tensor:
        """(B,), weighted sums."""
        return combine_rewards(self.rewards_per_func, self.trainer.reward_weights)

    @property
    def exact(self) -> bool:
        """Whether the policy computes in fp32, so that only the order of sums makes a difference."""
        trainer, inner = self.trainer, self.trainer.model
        fp32 = trainer.accelerator.mixed_precision == "no" and inner.dtype == torch.float32
        return fp32 and not is_quantized(inner) and not trainer.args.tf32

    def gradient(self, micro_batches: int) -> list[Tensor]:
        """Of each trained parameter for the batch in so many micro-batches, cut and weighted by the trainer's loader,
        differentiated by its step. Leaves no gradient behind."""
        trainer, args = self.trainer, self.trainer.args
        batch = replace(self.batch, ref_per_token_logps=self.ref_logps)
        batch.old_per_token_logps = None if args.num_iterations == 1 else self.logps
        cut = copy.copy(args)
        cut.per_device_train_batch_size = len(batch) // micro_batches
        cut.gradient_accumulation_steps = cut.steps_per_generation = micro_batches
        trainer.args = cut
        try:
            loader = trainer.get_train_dataloader()
            loader.collect = lambda prompts: batch
            for number, micro_batch in enumerate(islice(loader, micro_batches), 1):
                # private, but what transformers' own loop does; after an out-of-memory error all are done again
                trainer.accelerator.gradient_state._set_sync_gradients(number == micro_batches)
                trainer.training_step(trainer.model_wrapped, micro_batch)
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            scaler = trainer.accelerator.scaler  # of fp16, whose gradients are scaled until the optimizer's step
            scale = 1.0 if scaler is None else scaler.get_scale()
            return [torch.zeros_like(p) if p.grad is None else p.grad / scale for p in trained]
        finally:
            trainer.args = args
            trainer.model.zero_grad(set_to_none=True)
