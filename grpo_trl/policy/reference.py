"""The reference policy of the KL term: a frozen model, or the policy itself with another adapter (or none)."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path, use_adapter

from ..batch import RolloutBatch
from ..config import GRPOConfig, mapping
from ..placement import DeviceMap, freeze, input_device, is_zero3, place
from .loading import from_pretrained_options
from .logprobs import per_token_logps
from .mode import evaluation_mode

REFERENCE_ADAPTER = "frozen_reference"


class Reference(Protocol):
    """Scores a batch under the reference policy."""

    def per_token_logps(self, batch: RolloutBatch, temperature: float) -> Tensor:
        """(B, T) fp32 on the batch's device, without gradient."""
        ...


class FrozenReference:
    """A model of its own, on its own device. Only token ids go there and (B, T) log-probabilities come back."""

    def __init__(self, model: nn.Module):
        self.model = freeze(model)

    @torch.no_grad()
    def per_token_logps(self, batch: RolloutBatch, temperature: float) -> Tensor:
        """See `Reference`."""
        tokens = batch.tokens().to(input_device(self.model))
        logps, _ = per_token_logps(self.model, tokens, temperature=temperature)
        return logps.to(batch.completion_ids.device)


class AdapterReference:
    """The policy with its adapter switched off (None), or with a frozen adapter: no second model in memory."""

    def __init__(self, policy: Callable[[], nn.Module], accelerator: Accelerator, adapter: str | None):
        self.policy, self.accelerator, self.adapter = policy, accelerator, adapter

    @torch.no_grad()
    def per_token_logps(self, batch: RolloutBatch, temperature: float) -> Tensor:
        """See `Reference`."""
        model = self.policy()
        with_adapter: Any = self.accelerator.unwrap_model(model)
        with evaluation_mode(model), use_adapter(with_adapter, self.adapter):
            return per_token_logps(model, batch, temperature=temperature)[0]


def load_reference_model(
    policy: PreTrainedModel | PeftModel, policy_path: str | None, args: GRPOConfig, device_map: DeviceMap
) -> PreTrainedModel | None:
    """The frozen model, or None where there is no KL term or an adapter serves as reference.

    `args.ref_model_name_or_path` wins; else the policy's own path is loaded again (straight to its devices), and a
    policy that was passed as an instance is copied. `args.ref_model_init_kwargs` go over the policy's.
    """
    if not needs_reference_model(args, has_adapter=isinstance(policy, PeftModel)):
        return None
    path = args.ref_model_name_or_path or policy_path
    sharded = is_zero3(args.deepspeed_plugin)
    if path is None:
        copied: Any = copy.deepcopy(policy)
        return copied if sharded else place(copied, device_map)  # pyright: ignore[reportReturnType]
    own = mapping(args.ref_model_init_kwargs)
    options: dict[str, Any] = {"device_map": None if sharded else device_map} | from_pretrained_options(args) | own
    return create_model_from_path(path, None, **options)


def needs_reference_model(args: GRPOConfig, *, has_adapter: bool) -> bool:
    """Whether the reference is a model of its own: with a KL term, unless a policy with an adapter is its own."""
    return bool(args.beta) and (args.ref_model_name_or_path is not None or not has_adapter)


def freeze_adapter(model: PeftModel) -> str:
    """Keeps a copy of the active (trained) adapter as its own reference; returns the copy's name."""
    active = str(model.active_adapter)
    if REFERENCE_ADAPTER not in model.peft_config:  # there is one when the model was in a trainer before
        model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config[active]))
    weights = get_peft_model_state_dict(model, adapter_name=active)
    set_peft_model_state_dict(model, weights, adapter_name=REFERENCE_ADAPTER)
    model.set_adapter(active)  # adding one left it inactive but trainable
    return REFERENCE_ADAPTER


def make_reference(
    model: PreTrainedModel | None,
    policy: Callable[[], nn.Module],
    accelerator: Accelerator,
    *,
    adapter: str | None = None,
) -> Reference:
    """From `load_reference_model`'s result: a frozen model, or else the policy with `adapter` (None: switched off)."""
    if model is None:
        return AdapterReference(policy, accelerator, adapter)
    if is_zero3(accelerator.state.deepspeed_plugin):
        return FrozenReference(prepare_deepspeed(model, accelerator))  # loaded in shards, so it must run as such
    return FrozenReference(model)
