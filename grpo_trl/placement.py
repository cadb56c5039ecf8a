"""Which frozen model lives on which device.

The policy has one explicit device, `args.device`. A reference or reward model goes where `ref_device` or
`reward_device` says, as an accelerate device map, so that it can also be split over devices or quantised.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.utils import disable_fsdp_ram_efficient_loading, parse_flag_from_env
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

DeviceMap = dict[str, Any]
EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # what accelerate's function sets


def resolve_device_map(
    device: str | dict | None,
    policy_device: torch.device,
    *,
    num_gpus: int,
    num_local_ranks: int = 1,
    number: int = 0,
) -> DeviceMap:
    """`ref_device` / `reward_device` -> accelerate device map.

    Args:
        device: "auto" (or None) - a GPU that no rank of this machine trains on if there is one, else the policy's own
            device; "same" - the policy's; "cpu"; "cuda:N"; or an accelerate device map, returned as it is.
        policy_device: of this rank.
        num_gpus: visible GPUs of this process.
        num_local_ranks: training processes on this machine; their policies take the first GPUs, one each.
        number: 0, 1, ... for frozen models that "auto" puts on different GPUs where this rank's share has several.

    Raises:
        ValueError: a device that does not exist, one that another rank trains on, or a word that is none of these.
    """
    if isinstance(device, dict):
        if not set(device.values()) - {"disk"}:
            raise ValueError(
                f"the device map {device} has no device; name one for each part of the model, e.g. {{'': 'cpu'}}."
            )
        for place_of in device.values():
            if place_of != "disk":  # accelerate's word for weights that stay in their file
                _usable(place_of, policy_device, num_gpus, num_local_ranks)
        return device
    if device == "same":
        return {"": policy_device}
    if device in (None, "auto"):
        spare = range(num_local_ranks, num_gpus)
        if policy_device.type != "cuda" or not spare:
            return {"": policy_device}
        rank = policy_device.index or 0
        share = spare[rank::num_local_ranks] or [spare[rank % len(spare)]]
        return {"": torch.device("cuda", share[number % len(share)])}
    return {"": _usable(device, policy_device, num_gpus, num_local_ranks)}


def _usable(device: Any, policy_device: torch.device, num_gpus: int, num_local_ranks: int) -> torch.device:
    """A word, or in an accelerate map the number of a GPU, as a device that is there and that no other rank fills."""
    try:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {device!r} is unknown; use auto, same, cpu, cuda:N or an accelerate map.") from None
    if chosen.type not in ("cpu", "cuda", "meta", policy_device.type):
        raise ValueError(f"device {device!r} is none that this run has; use auto, same, cpu, cuda:N or a map of them.")
    if chosen.type != "cuda":
        return torch.device("cpu") if chosen.type == "cpu" else chosen  # there is one, whatever its number
    if (chosen.index or 0) >= num_gpus:
        raise ValueError(
            f"device {device!r} does not exist: {num_gpus} GPU(s) are visible to this process. Use auto (a spare GPU, "
            "else the policy's device), same, cpu, or make the GPU visible with CUDA_VISIBLE_DEVICES."
        )
    # said by every rank, also by the one that trains there: it would otherwise wait for those that refuse
    shared = 1 < num_local_ranks <= num_gpus and policy_device.type == "cuda"
    if shared and chosen.index is not None and chosen.index < num_local_ranks:
        raise ValueError(
            f"device {device!r} is the one that rank {chosen.index} of this machine trains on, and each of the "
            f"{num_local_ranks} ranks would put a model of its own there. Use auto (a spare GPU, else the rank's own "
            f"device), same, cpu, or one of the GPUs from {num_local_ranks} on."
        )
    return chosen


@contextlib.contextmanager
def whole_models(args: TrainingArguments) -> Iterator[None]:
    """Models that are loaded in this context are whole on each rank: also under ZeRO-3, which would shard them, and
    under FSDP, for which transformers before 5.23 leaves zeros on all ranks of a machine but the first."""
    deepspeed, efficient = args.deepspeed_plugin, os.environ.get(EFFICIENT_LOADING)
    # what `from_pretrained` looks at; the context that accelerate has for DeepSpeed leaves it as it is
    if deepspeed is not None:
        unset_hf_deepspeed_config()
    if efficient is not None:
        disable_fsdp_ram_efficient_loading()
    try:
        yield
    finally:
        if deepspeed is not None:
            set_hf_deepspeed_config(getattr(args, "hf_deepspeed_config", None) or deepspeed.dschf)
        if efficient is not None:
            os.environ[EFFICIENT_LOADING] = efficient


def is_fsdp() -> bool:
    """Whether the launcher asked for FSDP, which the `distributed_state` of `TrainingArguments` does not know."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def refuse_empty(model: Any, what: str) -> None:
    """For a model that was passed as an instance and that FSDP does not send its weights.

    Raises:
        ValueError: it was loaded outside `whole_models` and is without numbers (zeros before transformers 5.23).
    """
    if not is_fsdp():
        return
    weight = model.get_input_embeddings().weight  # an adapter's weights may be there
    if weight.is_meta or not weight.any():
        raise ValueError(
            f"{what} has no weights on this rank: with fsdp_cpu_ram_efficient_loading, transformers loads them on the "
            "first rank of a machine only. Pass the model's path instead of the model, or set "
            "fsdp_cpu_ram_efficient_loading to false."
        )


def check_map(model: nn.Module, device_map: DeviceMap) -> None:
    """Raises a ValueError for names that are none of the model's, and weights that have no device: `from_pretrained`
    passes over the first and takes the CPU for the second."""
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    unknown = [name for name in device_map if name not in modules and name not in weights]
    prefixes = tuple(f"{name}." if name else "" for name in device_map)
    left = [weight for weight in weights if not f"{weight}.".startswith(prefixes)]
    if unknown or left:
        parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
        raise ValueError(
            f"ref_device or reward_device: the map {device_map} does not fit {type(model).__name__}: "
            f"{f'it has no {unknown[0]!r}' if unknown else f'no device for {left[0]!r}'}; "
            f"its parts are {', '.join(parts)}, and what is in them."
        )


def place(model: nn.Module, device_map: DeviceMap) -> nn.Module:
    """Moves a loaded model to its devices. A one-device map adds no hooks: the caller moves the inputs."""
    if set(device_map) == {""}:
        return model.to(device_map[""])
    check_map(model, device_map)
    try:
        return dispatch_model(model, device_map)
    except ValueError as error:
        raise ValueError(
            f"ref_device or reward_device: the map {device_map} does not fit the model: {error}"
        ) from error


def input_device(model: nn.Module) -> torch.device:
    """Where a model, split over devices or not, takes its token ids."""
    # offloaded weights are on "meta" between forwards; accelerate's hooks move the inputs to where they are computed
    devices = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    return next(devices, torch.device("cpu"))


def runs_on(model: nn.Module, device: torch.device) -> bool:
    """Whether a device holds a part of a model, or the whole of it. Without a number, "cuda" is the first GPU."""
    places = {(parameter.device.type, parameter.device.index or 0) for parameter in model.parameters()}
    return (device.type, device.index or 0) in places


def is_zero3(deepspeed_plugin: Any) -> bool:
    """Whether every model that is loaded is sharded over the ranks (accelerate's plugin, or None)."""
    return deepspeed_plugin is not None and deepspeed_plugin.zero_stage == 3


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients: for reference and reward models."""
    model.eval()  # of which a DeepSpeed engine returns nothing
    return model.requires_grad_(False)
