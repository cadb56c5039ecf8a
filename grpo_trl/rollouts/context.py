"""The policy's weights, whole, for the time of a rollout."""

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from trl.models import unwrap_model_for_generation

from ..config import GRPOConfig, mapping


@contextlib.contextmanager
def weights_for_generation(model: nn.Module, accelerator: Accelerator, args: GRPOConfig) -> Iterator[PreTrainedModel]:
    """The unwrapped policy. Under DeepSpeed ZeRO-3 its shards are gathered once for the whole rollout, unless
    `ds3_gather_for_generation=False`; vLLM gathers what it sends by itself."""
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3 or args.use_vllm:
        yield accelerator.unwrap_model(model)
        return
    with unwrap_model_for_generation(
        model,  # pyright: ignore[reportArgumentType]
        accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=mapping(args.gradient_checkpointing_kwargs) or None,
    ) as unwrapped:
        yield unwrapped
