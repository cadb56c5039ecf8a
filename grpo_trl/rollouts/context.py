"""The policy's weights, whole, for the time of a rollout."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation

from ..config import GRPOConfig, mapping


@contextlib.contextmanager
def weights_for_generation(model: nn.Module, accelerator: Accelerator, args: GRPOConfig) -> Iterator[PreTrainedModel]:
    """The unwrapped policy. Under DeepSpeed ZeRO-3 its shards are gathered once for the whole rollout, unless
    `ds3_gather_for_generation=False`."""
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield cast(PreTrainedModel, accelerator.unwrap_model(model))
        return
    with unwrap_model_for_generation(
        model,  # pyright: ignore[reportArgumentType]
        accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=mapping(args.gradient_checkpointing_kwargs) or None,
    ) as unwrapped:
        yield cast(PreTrainedModel, unwrapped)
