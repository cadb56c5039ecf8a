"""A reference that follows the policy now and then (TR-DPO, arXiv 2404.09656)."""

import contextlib

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback


class SyncReferenceCallback(TrainerCallback):
    """Every `every` optimizer steps: reference <- (1 - mixup) x reference + mixup x policy.

    As `trl.trainer.callbacks.SyncRefModelCallback`, but the reference may be on another device and in another dtype
    than the policy: there `add_` raises.
    """

    def __init__(self, reference_model: nn.Module, mixup: float, every: int):
        self.reference_model = reference_model
        self.mixup = mixup
        self.every = every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            mix_into_reference(extract_model_from_parallel(model), self.reference_model, self.mixup)


@torch.no_grad()
def mix_into_reference(policy: nn.Module, reference: nn.Module, mixup: float) -> None:
    """reference <- (1 - mixup) x reference + mixup x policy, in place, parameter by parameter (soft update of
    arXiv 2404.09656, section 3.2; mixup=1 copies the policy).

    Computed in fp32 on the reference's device and rounded once to its dtype. Raises ValueError when the two do not
    have the same parameters (an adapter without a copy of its own, a quantised reference).
    """
    gathered = _zero3_gather()
    for (name, target), source in zip(reference.named_parameters(), policy.parameters(), strict=True):
        with gathered([target, source]):
            if target.shape != source.shape or not target.is_floating_point():
                raise ValueError(
                    f"The reference cannot follow the policy: its {name} is {tuple(target.shape)} {target.dtype}, the "
                    f"policy's {tuple(source.shape)} {source.dtype}. Use an unquantised copy of the policy as "
                    "reference, or sync_ref_model=False."
                )
            mixed = target.data.float().lerp_(source.data.to(target.device).float(), mixup)
            target.data.copy_(mixed)


def _zero3_gather():
    """Under DeepSpeed ZeRO-3, the context in which a parameter is whole on every rank; else one that does nothing."""
    plugin = AcceleratorState().deepspeed_plugin if AcceleratorState._shared_state else None
    if plugin is None or plugin.zero_stage != 3:
        return contextlib.nullcontext
    import deepspeed

    # every rank computes the same; what rank 0 holds is scattered again. Parameters that are not sharded stay as they
    # are, so an unsharded reference on each rank is served as well.
    return lambda parameters: deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
