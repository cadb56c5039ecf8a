"""The policy's weights, whole, for the time of a rollout.

A rollout then needs no other rank, so ranks may finish at different times. Under DeepSpeed ZeRO-3 shards are gathered
in place; under FSDP2, whose hooks can neither be removed nor run on a part of the model, into a replica.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation

from ..config import GRPOConfig, mapping
from ..placement import is_zero3


class Replica:
    """A policy of its own whose weights are there for the time of a rollout only. To be made before the policy is
    sharded.

    Args:
        policy: with or without adapters.
        device: of the rollouts.
    """

    def __init__(self, policy: nn.Module, device: torch.device):
        def empty(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(0, dtype=tensor.dtype, device=device)

        # deepcopy takes for copied what stands in its memo, so that no weight is; tied ones stay tied
        parts: dict[int, Any] = {id(p): nn.Parameter(empty(p), requires_grad=False) for p in policy.parameters()}
        parts |= {id(buffer): empty(buffer) for buffer in policy.buffers()}
        self.model: Any = copy.deepcopy(policy, parts)
        self.filled_by = 0  # rollouts, of which one may begin within another

    @contextlib.contextmanager
    def filled(self, policy: nn.Module) -> Iterator[Any]:
        """The replica with the whole weights of the sharded policy, for as long as one such context lasts. Every rank
        must enter it."""
        pairs = [
            *zip(self.model.parameters(), policy.parameters(), strict=True),
            *zip(self.model.buffers(), policy.buffers(), strict=True),
        ]
        for target, source in pairs:
            source = source.detach()
            target.data = (source.full_tensor() if isinstance(source, DTensor) else source).to(target.device)
        self.filled_by += 1
        try:
            yield self.model
        finally:
            self.filled_by -= 1
            for target, _ in pairs if not self.filled_by else ():
                target.data = target.new_empty(0)


def make_replica(policy: nn.Module, accelerator: Accelerator) -> Replica | None:
    """What rollouts under FSDP2 need; None under any other engine.

    Raises:
        ValueError: FSDP of version 1.
    """
    plugin: Any = accelerator.state.fsdp_plugin if hasattr(accelerator.state, "fsdp_plugin") else None
    if plugin is None:
        return None
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version}: whole weights for a rollout are gathered from FSDP2 only; set "
            "fsdp_version: 2, see accelerate_configs/fsdp2.yaml."
        )
    return Replica(policy, accelerator.device)


@contextlib.contextmanager
def weights_for_generation(
    model: nn.Module, accelerator: Accelerator, args: GRPOConfig, replica: Replica | None = None
) -> Iterator[PreTrainedModel]:
    """The unwrapped policy with all of its weights, gathered once for the whole rollout where they are sharded, so
    that every rank must enter it. With `ds3_gather_for_generation=False` they stay in shards under ZeRO-3, and for
    vLLM, which gathers what it sends by itself.

    Raises:
        RuntimeError: an engine shards when training begins, and it has not begun.
    """
    zero3 = is_zero3(accelerator.state.deepspeed_plugin)
    if (zero3 and not hasattr(model, "optimizer")) or (replica is not None and not isinstance(model, FSDPModule)):
        raise RuntimeError(
            "ZeRO-3 and FSDP2 shard the policy when train() begins, and nothing can be sampled before: use "
            "eval_on_start instead of evaluate() before train()."
        )
    if replica is not None and not args.use_vllm:
        with replica.filled(model) as whole:
            yield whole
        return
    if not zero3 or args.use_vllm:
        yield cast(PreTrainedModel, accelerator.unwrap_model(model))
        return
    with unwrap_model_for_generation(
        model,  # pyright: ignore[reportArgumentType]
        accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=mapping(args.gradient_checkpointing_kwargs) or None,
    ) as unwrapped:
        yield cast(PreTrainedModel, unwrapped)
