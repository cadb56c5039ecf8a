"""The reference policy of the KL term: a frozen model, or the policy itself with another adapter (or none)."""

import contextlib
import copy
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path, use_adapter

from ..batch import RolloutBatch
from ..config import GRPOConfig, mapping
from ..placement import (
    DeviceMap,
    check_map,
    freeze,
    input_device,
    is_zero3,
    place,
    refuse_empty,
    runs_on,
    whole_models,
)
from ..token_limit import TokenLimit, token_batches
from .loading import from_pretrained_options
from .logprobs import is_packed, per_token_logps
from .mode import evaluation_mode
from .packing import num_tokens, pieces

REFERENCE_ADAPTER = "frozen_reference"
INITS = ("init_lora_weights", "init_ia3_weights", "init_weights")  # how an adapter begins, by its kind
# init_lora_weights that do not put a part of the base into the adapter, as PiSSA and OLoRA do; all but False begin as
# nothing
LEAVE_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
NEVER_NOTHING = ("VBLORA", "UNILORA")


class Reference(Protocol):
    """Scores a batch under the reference policy."""

    own_device: torch.device | None  # where it can score while the policy computes on another; else None

    def per_token_logps(self, batch: RolloutBatch, temperature: float) -> Tensor:
        """(B, T) fp32 on the batch's device, without gradient."""
        ...


class Passes:
    """How a batch is scored: as many rows at a time as have no more tokens than the largest `rows` neighbours, nor
    than the limit. Where rows are padded, those of like length share a pass. With a fixed limit the neighbours do.
    """

    def __init__(self, rows: int, limit: TokenLimit):
        self.rows, self.limit = rows, limit

    def per_token_logps(self, model: nn.Module, batch: RolloutBatch, temperature: float) -> Tensor:
        """(B, T) fp32 on the batch's device, which is the model's."""

        def score() -> Tensor:
            result = torch.zeros_like(batch.completion_ids, dtype=torch.float32)
            for rows in self.cut(model, batch, self.limit.tokens):
                logps, _ = per_token_logps(model, batch.rows(rows), temperature=temperature)
                result[rows, : logps.shape[1]] = logps
            return result

        return self.limit.run(score, lambda tokens: self.cut(model, batch, tokens))

    def cut(self, model: nn.Module, batch: RolloutBatch, tokens: int | None) -> list[slice] | list[list[int]]:
        """The rows of each pass."""
        neighbours = [slice(start, start + self.rows) for start in range(0, len(batch), self.rows)]
        if self.limit.fixed:
            return neighbours
        packed = is_packed(model)
        most = max(num_tokens(batch.rows(rows), packed=packed) for rows in neighbours)
        most = most if tokens is None else min(most, tokens)
        if packed:
            return pieces(batch, most, packed=True)
        prompts, completions = batch.prompt_mask.sum(1).tolist(), batch.completion_mask.sum(1).tolist()
        return token_batches(list(zip(prompts, completions, strict=True)), most)


class FrozenReference:
    """A model of its own, on its own device. Only token ids go there and (B, T) log-probabilities come back."""

    def __init__(self, model: nn.Module, passes: Passes, own_device: torch.device | None = None):
        self.model, self.passes, self.own_device = freeze(model), passes, own_device

    @torch.no_grad()
    def per_token_logps(self, batch: RolloutBatch, temperature: float) -> Tensor:
        """See `Reference`."""
        device = input_device(self.model)
        tokens = batch.tokens().to(device)
        # kernels of Triton (Liger's) are launched on the current GPU, which is the policy's
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            logps = self.passes.per_token_logps(self.model, tokens, temperature)
        return logps.to(batch.completion_ids.device)


class AdapterReference:
    """The policy with its adapter switched off (None), or with a frozen adapter: no second model in memory."""

    own_device: torch.device | None = None

    def __init__(self, policy: Callable[[], nn.Module], accelerator: Accelerator, adapter: str | None, passes: Passes):
        self.policy, self.accelerator, self.adapter, self.passes = policy, accelerator, adapter, passes

    @torch.no_grad()
    def per_token_logps(self, batch: RolloutBatch, temperature: float) -> Tensor:
        """See `Reference`."""
        model = self.policy()
        with_adapter: Any = self.accelerator.unwrap_model(model)
        with evaluation_mode(model), use_adapter(with_adapter, self.adapter):
            return self.passes.per_token_logps(model, batch, temperature)


def load_reference_model(
    policy: PreTrainedModel | PeftModel, policy_path: str | None, args: GRPOConfig, device_map: DeviceMap
) -> PreTrainedModel | None:
    """The frozen model, or None where there is no KL term or an adapter serves as reference.

    `args.ref_model_name_or_path` wins; else the policy's own path is loaded again (straight to its devices), and a
    policy that was passed as an instance is copied. `args.ref_model_init_kwargs` go over the policy's.

    Raises:
        ValueError: see `refuse_empty` and `check_map`.
    """
    if not needs_reference_model(args, has_adapter=isinstance(policy, PeftModel)):
        return None
    path = args.ref_model_name_or_path or policy_path
    sharded = is_zero3(args.deepspeed_plugin)
    if path is None:
        refuse_empty(policy, "The policy, whose copy is the reference,")
        copied: Any = copy.deepcopy(policy)
        return copied if sharded else place(copied, device_map)  # pyright: ignore[reportReturnType]
    options = {"device_map": None if sharded else device_map} | reference_options(args, policy_path)
    with contextlib.nullcontext() if sharded else whole_models(args):
        model = create_model_from_path(path, None, **options)
    if not sharded:
        check_map(model, device_map)
    return model


def reference_options(args: GRPOConfig, policy_path: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the frozen model, but for its place."""
    options = from_pretrained_options(args)
    options.pop("device_map", None)  # of the policy; the frozen model is where `ref_device` says
    if args.ref_model_name_or_path not in (None, policy_path):
        options.pop("revision", None)  # of the policy's repository
    return options | mapping(args.ref_model_init_kwargs)


def needs_reference_model(args: GRPOConfig, *, has_adapter: bool) -> bool:
    """Whether the reference is a model of its own: with a KL term, unless a policy with an adapter is its own."""
    return bool(args.beta) and (args.ref_model_name_or_path is not None or not has_adapter)


def needs_frozen_adapter(args: GRPOConfig, config: PeftConfig, *, is_new: bool) -> bool:
    """Whether the policy as it was at the start is another than the policy with its adapter off: the adapter was
    trained before, or does not begin as nothing (PiSSA and OLoRA, which change the base too; a prefix)."""
    if not args.beta or args.ref_model_name_or_path is not None:
        return False
    start = next((getattr(config, name) for name in INITS if hasattr(config, name)), True)
    nothing = start is True or (isinstance(config, LoraConfig) and start in LEAVE_THE_BASE and start is not False)
    never = config.is_prompt_learning or str(getattr(config.peft_type, "value", config.peft_type)) in NEVER_NOTHING
    return not is_new or never or not nothing


def freeze_adapter(model: PeftModel) -> str:
    """Keeps a copy of the active adapter as its own reference; returns the copy's name. Raises ValueError where
    several are active."""
    if len(model.active_adapters) > 1:
        raise ValueError(
            f"The model has the active adapters {', '.join(model.active_adapters)}, of which the reference could copy "
            "one only: make one of them (model.add_weighted_adapter), activate one (model.set_adapter), or set beta=0."
        )
    active = str(model.active_adapter)
    if REFERENCE_ADAPTER not in model.peft_config:  # there is one when the model was in a trainer before
        config = copy.deepcopy(model.peft_config[active])
        config.inference_mode = True  # AdaLoRA allows one adapter that is trained
        # PiSSA would take its part from the base once more; one adapter alone may have a bias, and none is trained
        for name, value in {**dict.fromkeys(INITS, True), "bias": "none"}.items():
            if hasattr(config, name):
                setattr(config, name, value)
        model.add_adapter(REFERENCE_ADAPTER, config)
    weights = get_peft_model_state_dict(model, adapter_name=active)
    set_peft_model_state_dict(model, weights, adapter_name=REFERENCE_ADAPTER)
    model.set_adapter(active)  # adding one left it inactive but trainable
    for name, parameter in model.named_parameters():
        if f".{REFERENCE_ADAPTER}." in f"{name}.":  # of a prefix too, which `set_adapter` passes over
            parameter.requires_grad_(False)
    return REFERENCE_ADAPTER


def make_reference(
    model: PreTrainedModel | None,
    policy: Callable[[], nn.Module],
    accelerator: Accelerator,
    *,
    adapter: str | None = None,
    rows_per_pass: int,
    max_tokens: int | None = None,
) -> Reference:
    """From `load_reference_model`'s result: a frozen model, or else the policy with `adapter` (None: switched off).

    `rows_per_pass` and `max_tokens` size the passes; see `Passes`.
    """
    zero3 = is_zero3(accelerator.state.deepspeed_plugin)
    sharded = zero3 or (model is None and accelerator.distributed_type == DistributedType.FSDP)
    passes = Passes(rows_per_pass, TokenLimit("the reference", max_tokens, fixed=sharded))
    if model is None:
        return AdapterReference(policy, accelerator, adapter, passes)
    if zero3:  # what was loaded in shards must run as such
        return FrozenReference(prepare_deepspeed(model, accelerator), passes)
    return FrozenReference(model, passes, None if runs_on(model, accelerator.device) else input_device(model))


def whole_parameters(parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
    """Under DeepSpeed ZeRO-3, the context in which parameters are whole on every rank; else one that does nothing.
    What rank 0 makes of them is scattered again; those that are not sharded stay as they are. All ranks must enter it.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0)
