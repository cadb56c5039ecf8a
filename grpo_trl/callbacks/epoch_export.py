"""`epoch_1/`, `epoch_2/`, ...: what an epoch left, complete enough to use it and to run it again."""

import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.trainer.utils import get_config_model_id

from ..config import FOLLOWING, GOVERNED
from ..config_types import default_of
from ..disk import disk_errors_named

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parent.parent
RECIPE_NAME = "recipe.yaml"
SCRIPT_NAME = "train_script.py"
REPEAT = "grpo-trl train --config recipe.yaml"

# The command `grpo-trl train` runs no script of the user's; this one repeats the run from the recipe beside it.
COMMAND_SCRIPT = '''"""This run was started by `grpo-trl train`; this file starts it again."""

import sys
from pathlib import Path

from grpo_trl.cli import main

if __name__ == "__main__":
    main(["train", "--config", str(Path(__file__).with_name("recipe.yaml")), *sys.argv[1:]])
'''

# Keys of nested dicts that hold credentials; at the top level `TrainingArguments.to_dict` hides `*_token`.
SECRETS = frozenset({"token", "hf_token", "hub_token", "push_to_hub_token", "use_auth_token", "api_key"})

# Follow from other arguments, from the machine, from the trainer or from how a run was started, and so do not belong
# in a recipe.
DERIVED = frozenset(
    {
        *("do_eval", "generation_batch_size", "ignore_data_skip", "dataloader_pin_memory", "resume_from_checkpoint"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),  # gradient_checkpointing, by its later name
    }
)


class EpochExportCallback(TrainerCallback):
    """At the end of each epoch writes `<output_dir>/epoch_<n>/`, n = 1, 2, ...; on all ranks, as `save_model` is.

    The folder holds the weights (safetensors), `config.json`, the tokenizer, `recipe.yaml` as resolved and the script
    that ran as `train_script.py`. No `training_args.bin`: the recipe says the same without a pickle and without
    tokens. It is written under another name and renamed when complete, and replaces one of an earlier run. A run that
    `max_steps` ends within an epoch writes that epoch too.

    LoRA: the folder holds the adapter that is trained (one not in use, such as a frozen reference, is left out), and
    `base_model/config.json`. Beside the adapter a `config.json` would make transformers take the folder for a whole
    model: without it `AutoModelForCausalLM.from_pretrained` loads the base model and the adapter. So does
    `peft.AutoPeftModelForCausalLM`, which reads DoRA's magnitudes too (transformers 5.23 does not). Of an
    encoder-decoder both end in `Seq2SeqLM`.

    A run that pushes to the Hub writes `_epoch_<n>/`, which a push leaves out: neither a script nor a copy of the
    weights per epoch is to be published unasked.

    Args:
        trainer: its `save_model`, `args`, `model` and `accelerator` are used, and what [`recipe_yaml`] reads.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._script = train_script()  # now: the file may change while it runs
        self._said_no_script = False

    def on_epoch_end(self, args, state, control, **kwargs):
        # an epoch that a resume or `max_steps` cut counts as the one it is part of
        number = max(1, math.ceil(state.epoch - 1e-6))
        mark = "_" if args.push_to_hub else ""
        folder = Path(str(args.output_dir)) / f"{mark}epoch_{number}"
        with disk_errors_named(folder):
            self._export(folder)

    def _export(self, folder: Path) -> None:
        trainer = self.trainer
        temporary = folder.with_name(f"_{folder.name}")  # `_*` is what a push to the Hub leaves out
        if trainer.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        trainer.accelerator.wait_for_everyone()
        # internal: a save by the user would push to the Hub
        trainer.save_model(str(temporary), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if not trainer.args.should_save:
            return
        self._complete(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)

    def _complete(self, folder: Path) -> None:
        """Adds what `save_model` does not write, and takes away what does not belong in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for adapter in inactive_adapters(model):
            shutil.rmtree(folder / adapter, ignore_errors=True)
        if isinstance(model, PeftModel):
            model.config.save_pretrained(folder / "base_model")
            # PEFT gives an adapter that is not called "default" a folder of its own, where transformers does not look
            for file in (folder / str(model.active_adapter)).glob("*"):
                os.replace(file, folder / file.name)
            shutil.rmtree(folder / str(model.active_adapter), ignore_errors=True)
        if not any(folder.glob("*.safetensors")):
            logger.warning(
                "%s holds no safetensors: the weights are sharded over ranks and were not gathered; set "
                "fsdp_state_dict_type: FULL_STATE_DICT (FSDP) or zero3_save_16bit_model: true (ZeRO-3).",
                folder.name.removeprefix("_"),
            )
        (folder / RECIPE_NAME).write_text(recipe_yaml(self.trainer), encoding="utf-8")
        if self._script is not None:
            (folder / SCRIPT_NAME).write_bytes(self._script)
        elif not self._said_no_script:
            logger.warning("No %s in the epoch folders: this run was not started from a script.", SCRIPT_NAME)
            self._said_no_script = True


def inactive_adapters(model: Any) -> list[str]:
    """Names of the adapters of a PeftModel that are not in use; [] for any other model."""
    return sorted(set(model.peft_config) - set(model.active_adapters)) if isinstance(model, PeftModel) else []


def train_script() -> bytes | None:
    """The script that runs; for the command `grpo-trl` one that repeats the run from `recipe.yaml`; None
    when there is neither (a notebook, `python -c`)."""
    path = Path(getattr(sys.modules["__main__"], "__file__", None) or "").absolute()
    if path.stem == "grpo-trl" or path.is_relative_to(PACKAGE):
        return COMMAND_SCRIPT.encode()
    return path.read_bytes() if path.suffix == ".py" and path.is_file() else None


def recipe_yaml(trainer: Any) -> str:
    """The recipe of a run as YAML, for `grpo-trl train --config`: the objective as resolved (in comments what its
    row says), and every argument that differs from its default and from what follows from others.

    Reads `trainer.args` (a `GRPOConfig`) and `trainer.recipe`: the top-level keys of the run's own YAML that are no
    fields of it, such as model, data entries and rewards, or None. With None, these are named in comments
    (`trainer.model`, `trainer.reward_names`): a script's run is repeated by the script. Tokens are left out, and so
    are values that YAML cannot hold (a comment names them).
    """
    args, recipe = trainer.args, trainer.recipe
    values, objective = args.to_dict(), args.objective
    changed = [name for name in _changed(args, values) if name not in {*objective, *(recipe or {})}]
    # what the row says is said by its name: with it as an entry, another --variant would change nothing
    row = args.row
    of_its_own = [name for name in GOVERNED if objective[name] != row[name]]
    source = _recipe_entries(recipe) if recipe is not None else _comments(_described(trainer))
    by_script = f"python {SCRIPT_NAME}, with the arguments that it was given"
    lines = [
        f"# A run as resolved; to repeat it: {by_script if recipe is None else REPEAT}",
        "# " + ", ".join(f"{name} {version(name)}" for name in ("transformers", "trl", "torch")),
        f"# ranks: {args.world_size}",
        *["", "# Model, data and rewards", *source],
        *["", *_comments({"Objective": objective["paper"]})],
        *_entries({"variant": objective["variant"], **{name: objective[name] for name in of_its_own}}),
        *_comments({name: objective[name] for name in GOVERNED if name not in of_its_own}),
        *["", "# Training", *_entries({name: values[name] for name in changed})],
    ]
    return "\n".join(lines) + "\n"


def _changed(args: Any, values: Mapping[str, Any]) -> list[str]:
    """Names of the fields that differ from their default, without what is derived, hidden or merely normalised."""
    names = []
    for field in fields(args):
        if not field.init or field.name.endswith("_token"):
            continue
        if field.name in DERIVED or (field.name == "bf16" and args.bf16_by_default):
            continue
        if field.name in FOLLOWING and values[field.name] == FOLLOWING[field.name](args):
            continue
        default = default_of(field)
        value = values[field.name]
        normalised = field.name == "accelerator_config" and value.items() <= AcceleratorConfig().to_dict().items()
        if value != default and value not in ([], {}) and not normalised:
            names.append(field.name)
    return names


def _recipe_entries(recipe: Mapping[str, Any]) -> list[str]:
    """Of `env` the names alone: values may be secrets."""
    lines = _entries({name: value for name, value in recipe.items() if name != "env"})
    names = recipe.get("env")
    return lines + _comments({"env, to be set again (values are not written)": ", ".join(names)}) if names else lines


def _described(trainer: Any) -> dict[str, Any]:
    model = get_config_model_id(trainer.model.config) or type(trainer.model).__name__
    return {"model": model, "rewards": ", ".join(trainer.reward_names), "data": "given in code"}


def _entries(values: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in values.items():
        try:
            text = yaml.safe_dump({name: _plain(value)}, sort_keys=False, allow_unicode=True, width=110)
        except yaml.representer.RepresenterError:
            lines.append(f"# {name}: a {type(value).__name__}, which YAML cannot hold; set it in code")
            continue
        lines += text.rstrip("\n").split("\n")
    return lines


def _plain(value: Any) -> Any:
    """Paths as text, tuples as lists, nested credentials left out."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key not in SECRETS}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _comments(values: Mapping[str, Any]) -> list[str]:
    return [f"# {name}: {value}".replace("\n", " ") for name, value in values.items()]
