"""What a resumed run needs beyond transformers' own files, and which folder it is taken from.

Per rank: tensors as safetensors, numbers as JSON. Loading executes no code.
"""

import json
from collections.abc import Collection
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from . import manifest
from .config import GRPOConfig
from .jsonable import with_text_keys
from .manifest import ResumeError
from .placement import input_device
from .policy import LEAVE_THE_BASE, whole_parameters

logger = logging.get_logger(__name__)

REFERENCE_NAME = "reference.safetensors"

# Fields of transformers that change what is computed, and fields of ours that do not. Those of the loader's layout are
# refused when they differ.
COMPUTED = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16"),
)
# Those of them that torch's optimizers and schedulers save and restore
OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
NOT_COMPUTED = (
    *("logging_steps", "gradient_checkpointing", "model_init_kwargs", "reward_model_init_kwargs", "trust_remote_code"),
    *("ref_device", "reward_device", "ds3_gather_for_generation", "max_concurrent_rows", "reward_call"),
    *("reward_overlap", "reward_timeout", "reward_batch_size", "num_generations_eval", "eval_temperature"),
    *("eval_max_completion_length", "log_completions", "num_completions_to_print", "log_unique_prompts"),
    *("log_rollouts", "save_epochs", "plot_metrics", "save_on_signal"),
)
# Settings of adapters (PEFT) for which other weights are trained; lists among them whose order says nothing; and
# settings that change nothing in a resumed run
SHAPES_OF_ADAPTER = (
    *("adapter.r", "adapter.rank_pattern", "adapter.target_modules", "adapter.target_parameters"),
    *("adapter.exclude_modules", "adapter.layers_to_transform", "adapter.modules_to_save", "adapter.use_dora"),
    *("adapter.trainable_token_indices", "adapter.layer_replication", "adapter.bias", "adapter.lora_bias"),
    *("adapter.num_virtual_tokens", "adapter.init_r", "adapter.oft_block_size", "adapter.feedforward_modules"),
    "adapter.changes the base by",
)
UNORDERED = (
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "target_parameters"),
    "feedforward_modules",
)
NOT_OF_ADAPTER = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("auto_mapping", "runtime_config", "init_lora_weights", "init_weights", "ensure_weight_tying"),
)


# ---- Weights ----


def weights_left_out(model: nn.Module, folder: Path) -> list[str]:
    """Names in a model's state that a folder's safetensors do not have, nor the weight that they are tied to; [] where
    it has none."""
    saved: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= set(file.keys())
    state = model.state_dict()
    there = {tensor.data_ptr() for name, tensor in state.items() if name in saved}
    return [name for name, tensor in state.items() if saved and name not in saved and tensor.data_ptr() not in there]


def load_weights(model: Any, folder: Path, names: Collection[str]) -> None:
    """Copies these weights from a folder into a model, in place, by way of `from_pretrained`, which knows under which
    names a class is saved.

    Raises:
        ResumeError: some are not in the folder.
    """
    own = model.state_dict()
    dtype = reduce(torch.promote_types, (own[name].dtype for name in names))
    loaded, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(set(names) & set(info["missing_keys"])):
        raise ResumeError(
            f"Cannot load the weights of {folder}: it lacks {', '.join(missing[:5])}{' ...' if missing[5:] else ''}."
        )
    state = loaded.state_dict()
    model.load_state_dict({name: state[name] for name in names}, strict=False)


# ---- Which folder ----


def checked(folder: Path) -> Path:
    """A checkpoint that was named. Raises ResumeError with every file of it that is missing or corrupt."""
    found = _obstacles(folder)
    if found:  # not before: a complete one may lie on a disk that cannot be written
        manifest.recover(folder.parent)
        found = _obstacles(folder)
    if found and not (folder / manifest.NAME).exists() and (folder / TRAINER_STATE_NAME).exists():
        raise ResumeError(
            f"Cannot resume from {folder}: it was written by another trainer (TRL's, say), or its writing was "
            f"interrupted. Start from its weights, model={str(folder)!r}, without resume_from_checkpoint."
        )
    if found:
        raise ResumeError(
            f"Cannot resume from {folder}: {'; '.join(found)}. Name another checkpoint, or use "
            "resume_from_checkpoint=True, which takes the newest complete one."
        )
    return folder


def newest(output_dir: Path) -> Path:
    """The newest complete checkpoint. Those passed over are named in a warning.

    Raises:
        ResumeError: there is none.
    """
    manifest.recover(output_dir)
    passed_over = []
    for folder in reversed(manifest.checkpoints(output_dir)):
        found = _obstacles(folder)
        if not found:
            if passed_over:
                logger.warning("Resuming from %s. Passed over: %s.", folder, "; ".join(passed_over))
            return folder
        passed_over.append(f"{folder.name} ({', '.join(found)})")
    raise ResumeError(
        f"resume_from_checkpoint=True, but {output_dir} has no complete checkpoint"
        f"{': ' + '; '.join(passed_over) if passed_over else ''}. Leave resume_from_checkpoint out to start anew."
    )


def check_resumable(resume: str | bool, output_dir: Path) -> None:
    """Raises ResumeError where there is nothing to resume from, before models are loaded; files are read later."""
    if resume is True and not (manifest.checkpoints(output_dir) or any(output_dir.glob("_checkpoint-*"))):
        raise ResumeError(
            f"resume_from_checkpoint=True, but {output_dir} has no checkpoint. Leave it out to start anew."
        )
    if resume is not True and not Path(str(resume)).is_dir():
        raise ResumeError(f"resume_from_checkpoint={str(resume)!r}: no such folder (current directory: {Path.cwd()}).")


def _obstacles(folder: Path) -> list[str]:
    """Why a run cannot be resumed from a folder."""
    found = manifest.problems(folder)
    if not found and not manifest.holds(folder, _files(folder, 0)[0].name):
        found = ["it holds weights only (save_only_model); start from them instead (model_name_or_path, or model=)"]
    return found


# ---- What changed ----


def config_values(args: GRPOConfig) -> dict[str, Any]:
    """The settings that change what is computed, as JSON holds them."""
    values = args.to_dict()
    names = sorted({*COMPUTED, *GRPOConfig.__annotations__}.difference(NOT_COMPUTED))
    return json.loads(json.dumps({name: values[name] for name in names if name in values}, default=str))


def adapter_values(config: PeftConfig) -> dict[str, Any]:
    """The settings of an adapter, as JSON holds them."""
    values = {
        f"adapter.{name}": sorted(value, key=str) if _has_no_order(name, value) else value
        for name, value in config.to_dict().items()
        if name not in NOT_OF_ADAPTER
    }
    start = getattr(config, "init_lora_weights", True)
    values["adapter.changes the base by"] = None if start in LEAVE_THE_BASE else start
    return json.loads(json.dumps(with_text_keys(values), default=str))


def _has_no_order(name: str, value: Any) -> bool:
    return isinstance(value, set) or (isinstance(value, list) and name in UNORDERED)


def check_fits(folder: str, now: dict[str, Any]) -> None:
    """Raises ResumeError where a run with the settings `now` trains other weights, or steps otherwise, than the one
    that wrote the checkpoint."""
    then = load_numbers(folder, 0)["config"]
    for name in ("model_type", "adapter", *SHAPES_OF_ADAPTER, "optim"):
        if name in then and name in now and then[name] != now[name]:
            raise ResumeError(
                f"Cannot resume from {folder}: {name} was {then[name]} then and is {now[name]} now, for which its "
                "weights and optimizer's state are not made. Start from its weights instead (model_name_or_path; in "
                "Python model=)."
            )


def changed_config(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One phrase per setting that differs."""
    kept = " (without effect: the optimizer of the checkpoint keeps its own)"
    return [
        f"{name}: {then[name]} then, {now[name]} now{kept if name in OF_THE_OPTIMIZER else ''}"
        for name in now
        if name in then and then[name] != now[name]
    ]


# ---- A rank's state ----


def save(folder: str, rank: int, state: dict[str, Any]) -> None:
    """Writes a rank's state: `state["loader"]["buffer"]` holds its tensors, everything else is plain numbers."""
    loader = dict(state["loader"])
    buffer = {name: tensor.contiguous().cpu() for name, tensor in loader.pop("buffer").items()}
    numbers, tensors = _files(folder, rank)
    numbers.parent.mkdir(parents=True, exist_ok=True)  # ranks other than 0 may be here first
    save_file(buffer, tensors)
    numbers.write_text(json.dumps({**state, "loader": loader}, indent=2))


def load(folder: str, rank: int) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        FileNotFoundError: the checkpoint has no state for this rank: it was written by another trainer, with
            save_only_model, or with fewer ranks.
    """
    state = load_numbers(folder, rank)
    state["loader"]["buffer"] = load_file(_files(folder, rank)[1])
    return state


def load_numbers(folder: str, rank: int) -> dict[str, Any]:
    """What `save` wrote, without the tensors. Raises as `load` does."""
    numbers = _files(folder, rank)[0]
    if not numbers.exists():
        raise FileNotFoundError(
            f"{numbers} is missing, so this run cannot be resumed from {folder}: the checkpoint was written by "
            "another trainer, with save_only_model=True, or with fewer ranks. Start from its weights instead "
            "(model_name_or_path; in Python model=)."
        )
    return json.loads(numbers.read_text())


def save_reference(folder: str, model: nn.Module, *, write: bool) -> None:
    """Writes a reference that changes during the run (`sync_ref_model`). Every rank calls it, and one writes."""
    with whole_parameters(model.parameters()):
        if write:
            save_model(model, str(Path(folder) / REFERENCE_NAME))


def load_reference(folder: str, model: nn.Module) -> None:
    """Restores what `save_reference` wrote."""
    with whole_parameters(model.parameters()):
        load_model(model, Path(folder) / REFERENCE_NAME, device=str(input_device(model)))


def _files(folder: str | Path, rank: int) -> tuple[Path, Path]:
    return Path(folder) / f"rollout_state_{rank}.json", Path(folder) / f"rollout_buffer_{rank}.safetensors"
