"""A reference that follows the policy now and then (TR-DPO, arXiv 2404.09656)."""

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..policy import whole_parameters


class SyncReferenceCallback(TrainerCallback):
    """Every `every` optimizer steps: reference <- (1 - mixup) x reference + mixup x policy.

    As `trl.trainer.callbacks.SyncRefModelCallback`, but the reference may be on another device and in another dtype
    than the policy: there `add_` raises. Raises ValueError before the first step when the two do not have the same
    parameters: another architecture, or a quantised one.
    """

    def __init__(self, reference_model: nn.Module, mixup: float, every: int):
        self.reference_model = reference_model
        self.mixup = mixup
        self.every = every

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        policy: Any = extract_model_from_parallel(model)
        _check_same_parameters(policy, self.reference_model)
        if any(parameter.is_meta for parameter in self.reference_model.parameters()):
            raise ValueError(
                "sync_ref_model=True cannot follow the policy in weights that ref_device has put on the disk, or that "
                "move to a GPU only while they are used; use a map of devices that hold all of the reference."
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            policy: Any = extract_model_from_parallel(model)
            mix_into_reference(policy, self.reference_model, self.mixup)


@torch.no_grad()
def mix_into_reference(policy: nn.Module, reference: nn.Module, mixup: float) -> None:
    """reference <- (1 - mixup) x reference + mixup x policy, in place, parameter by parameter: the soft update of
    arXiv 2404.09656; mixup=1 copies the policy. Computed in fp32 on the reference's device, rounded once to its dtype.
    """
    for target, source in zip(reference.parameters(), policy.parameters(), strict=True):
        with whole_parameters([target, source]):
            whole = source.data.full_tensor() if isinstance(source.data, DTensor) else source.data  # FSDP2
            target.data.copy_(target.data.float().lerp_(whole.to(target.device).float(), mixup))


def _check_same_parameters(policy: nn.Module, reference: nn.Module) -> None:
    # under ZeRO-3 a parameter is empty outside the gathering, and its shape is `ds_shape`; quantised ones are integers
    policy_shapes, reference_shapes = (
        {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.is_floating_point()}
        for model in (policy, reference)
    )
    differing = [
        f"{name}: {reference_shapes.get(name)} in the reference, {policy_shapes.get(name)} in the policy"
        for name in {**policy_shapes, **reference_shapes}
        if policy_shapes.get(name) != reference_shapes.get(name)
    ]
    if differing:
        raise ValueError(
            f"sync_ref_model=True needs a reference with the policy's parameters, but {len(differing)} differ, first "
            f"{differing[0]}. Use an unquantised copy of the policy as reference, or set sync_ref_model=False."
        )
