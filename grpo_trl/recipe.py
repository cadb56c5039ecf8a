"""A recipe: data, rewards, training and model in one YAML file and on the command line, read and checked."""

import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.utils import logging
from trl.scripts.utils import ScriptArguments as TRLScriptArguments
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig

from .config import GRPOConfig
from .config_types import type_problems
from .data import parse_entries
from .refused import raise_all, refuse

logger = logging.get_logger(__name__)

# Options of TRL's GRPO script that this one does not have: name -> what to do instead.
REFUSED_SCRIPT_OPTIONS = {
    "datasets": "list the data in `train_datasets: [{path, type, input, output}]`; see docs/configuration.md",
    "streaming": "use `dataset_streaming` with `dataset_name`",
    "test_split_size": "name the held-out rows in `eval_datasets`, e.g. `split: train[-200:]`",
    "ignore_bias_buffers": "remove it: TRL's GRPO script does not read it either",
}


ALIASES = {"model": ["model_name_or_path"]}  # what users take a field for


@dataclass
class ScriptArguments(TRLScriptArguments):
    """The data and the rewards of a recipe; everything else is in [`GRPOConfig`] and `trl.ModelConfig`.

    Data come from `train_datasets` (checked row by row; `grpo_trl.data.load_datasets`) or, as in TRL, from
    `dataset_name` with its `dataset_*` fields, whose rows must have a `prompt`.
    """

    # `str` stands second: it is the type that the parser gives to a value of the command line
    train_datasets: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "Training data: list of {path, type, input, output, split, weight, name}."}
    )
    eval_datasets: list[dict[str, Any]] | str | dict[str, list[dict[str, Any]]] | None = field(
        default=None, metadata={"help": "Evaluation data, read if eval_strategy asks for it: a list, or {name: list}."}
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Sequence-classification reward model; comes before reward_funcs."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Registered names, dotted paths, or ids and paths of reward models."}
    )
    ignore_bias_buffers: bool = field(default=False, init=False)  # REFUSED_SCRIPT_OPTIONS
    env: dict[str, str] = field(default_factory=dict, init=False)  # of the YAML file: set while it is read

    def __post_init__(self):
        for name in ("train_datasets", "eval_datasets"):
            setattr(self, name, _from_json(name, getattr(self, name)))
        if isinstance(self.reward_funcs, str):  # a single name in a YAML file
            self.reward_funcs = [self.reward_funcs]

    @property
    def rewards(self) -> list[str]:
        """The reward model first, then the functions: the order of `reward_weights`, as in TRL."""
        model = [self.reward_model_name_or_path] if self.reward_model_name_or_path else []
        return model + (self.reward_funcs or [])


class RecipeParser(TrlParser):
    """`TrlParser` that explains: TRL options that we refuse get their remedy, misspelt fields the closest one.

    Every error is a ValueError. TRL options that would change nothing are dropped, as `GRPOConfig` does.
    """

    def __init__(self, prog: str = "grpo-trl train", own_options: str = ""):
        dataclass_types: Any = (ScriptArguments, GRPOConfig, ModelConfig)
        # no abbreviations: a misspelt `--num_gen` would otherwise set num_generations
        usage = f"{prog} --config YAML {own_options}[--field value ...]"
        super().__init__(dataclass_types, prog=prog, usage=usage, allow_abbrev=False)
        self.field_names = [f.name for cls in dataclass_types for f in fields(cls) if f.init]
        self._optional = {f.name for cls in dataclass_types for f in fields(cls) if f.init and f.default is None}
        self._unknown: dict[str, Any] = {}

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        self._unknown |= {name: value for name, value in config.items() if name not in self.field_names}
        # argparse checks choices on the command line only
        raise_all(
            [
                f"{action.dest}={config[action.dest]!r} is unknown; use one of {', '.join(map(str, action.choices))}"
                f"{_unquoted(config[action.dest])}."
                for action in self._actions
                if action.choices and config.get(action.dest) is not None and config[action.dest] not in action.choices
            ]
        )
        return super().set_defaults_with_config(**{n: v for n, v in config.items() if n in self.field_names})

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        args, nulls = _without_nulls(sys.argv[1:] if args is None else list(args), self._optional)
        self.set_defaults(**nulls)
        namespace, unused = super().parse_known_args(args, namespace)
        unknown = refuse(self._unknown | _options(unused))
        raise_all([self._unknown_problem(name) for name, value in unknown.items() if not _is_off(name, value)])
        return namespace, []

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # argparse would print the 200 options first

    def _unknown_problem(self, name: str) -> str:
        if name in REFUSED_SCRIPT_OPTIONS:
            return f"{name} is an option of TRL's script that is not available here; {REFUSED_SCRIPT_OPTIONS[name]}."
        if name.endswith((".yaml", ".yml")):
            return f"{name!r} is no field; a recipe is given as --config {name}."
        close = ALIASES.get(name) or difflib.get_close_matches(name.replace("-", "_"), self.field_names, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists the fields."
        return f"{name!r} is no field; {remedy}"


def _unquoted(value: Any) -> str:
    return ' ("no" in quotes: without them YAML reads it as False)' if value is False else ""


def _by_option(argv: Sequence[str]) -> list[list[str]]:
    """`["--a", "1", "--b=x"]` -> `[["--a", "1"], ["--b", "x"]]`; words before any option each by itself."""
    parts: list[list[str]] = []
    for arg in argv:
        if arg.startswith("--"):
            parts.append(arg.split("=", 1))
        elif parts and parts[-1][0].startswith("--"):
            parts[-1].append(arg)
        else:
            parts.append([arg])
    return parts


def _without_nulls(argv: list[str], names: set[str]) -> tuple[list[str], dict[str, None]]:
    """A command line without `--field null` (or none) of fields that may be None, and these fields: argparse would
    take the word for a text."""
    rest: list[str] = []
    nulls: dict[str, None] = {}
    for option, *values in _by_option(argv):
        name = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and name in names and [value.lower() for value in values] in (["null"], ["none"]):
            nulls[name] = None
        else:
            rest += [option, *values]
    return (rest, nulls) if nulls else (argv, {})


def _is_off(name: str, value: Any) -> bool:
    """An option of TRL's script with its default there."""
    return name in REFUSED_SCRIPT_OPTIONS and value in (None, False, [])


Recipe = tuple[ScriptArguments, GRPOConfig, ModelConfig]


def parse_recipe(argv: Sequence[str], prog: str = "grpo-trl train", own_options: str = "") -> Recipe:
    """`--config recipe.yaml --field value ...` -> checked arguments; nothing is loaded. The command line wins.
    `own_options` are shown only: they have been taken out of `argv`.

    Raises:
        ValueError: unknown fields, refused TRL options, values that do not fit; no model, data or rewards.
    """
    sys.path.insert(0, os.getcwd())  # a dotted path may name a module of the current folder, as in TRL
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if argv[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a recipe's YAML file.")
    script_args, args, model_args = RecipeParser(prog, own_options).parse_args_and_config(argv)
    # the command line has text only; True: the last checkpoint
    switches: dict[str, Any] = {"true": True, "false": False}
    resume = args.resume_from_checkpoint
    args.resume_from_checkpoint = switches.get(str(resume).lower(), resume)
    if "--config" in argv:
        recipe = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text(encoding="utf-8")) or {}
        script_args.env = recipe.get("env") or {}
    target = model_args.lora_target_modules
    if isinstance(target, str) and target != "all-linear" and re.fullmatch(r"[\w.]+", target):
        model_args.lora_target_modules = [target]  # of which TRL makes a text, and PEFT a pattern for whole names
    raise_all(_problems(script_args, args, model_args))
    _say_what_adapters_lack(model_args)
    return script_args, args, model_args


def _problems(script_args: ScriptArguments, args: GRPOConfig, model_args: ModelConfig) -> list[str]:
    """What a recipe lacks, and entries that cannot be right, without reading data. `GRPOTrainer` checks the rest."""
    problems = type_problems(model_args, [field.name for field in fields(model_args) if field.init])
    if not model_args.model_name_or_path:
        problems.append("model_name_or_path is missing: the id or path of the policy, e.g. Qwen/Qwen3-0.6B.")
    if not script_args.rewards:
        problems.append("no reward: set reward_funcs, e.g. [accuracy, think_format], or reward_model_name_or_path.")
    if bool(script_args.train_datasets) == bool(script_args.dataset_name):
        found = "both" if script_args.dataset_name else "neither"
        problems.append(
            "training data: expected either train_datasets: [{path, type, input, output}] or dataset_name, "
            f"got {found}."
        )
    if args.evaluates and not (script_args.eval_datasets or script_args.dataset_name):
        problems.append("evaluation (eval_strategy, eval_on_start) needs data: set eval_datasets, or switch it off.")
    for where, entries in {"train_datasets": script_args.train_datasets, **_named_eval_sets(script_args)}.items():
        if entries is not None:
            try:
                parse_entries(entries, where)
            except ValueError as error:
                problems.append(str(error))
    return problems


def _say_what_adapters_lack(model_args: ModelConfig) -> None:
    # no error: `--use_peft false` shall train all weights by the same recipe
    of_adapters = [name for name in changed_fields(model_args) if name.startswith(("lora_", "use_rslora", "use_dora"))]
    if of_adapters and not model_args.use_peft:
        logger.warning("%s: without effect, all weights are trained; set use_peft: true.", ", ".join(of_adapters))


def _from_json(name: str, value: Any) -> Any:
    """The value of a YAML file as it is; text, as the command line gives it, as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        example = '[{"path": "train.jsonl", "type": "jsonl", "input": "question", "output": "answer"}]'
        raise ValueError(f"--{name} takes JSON, e.g. '{example}'; got {value!r} ({error}).") from error


def _options(unused: Sequence[str]) -> dict[str, Any]:
    """Command-line rest -> name -> value: `["--a", "1", "--b=x", "--c"]` -> `{"a": 1, "b": "x", "c": True}`."""
    return {option.removeprefix("--"): _yaml_value(values) for option, *values in _by_option(unused)}


def _yaml_value(words: list[str]) -> Any:
    if len(words) > 1:
        return words
    return (None if words[0].lower() == "none" else yaml.safe_load(words[0])) if words else True


def _named_eval_sets(script_args: ScriptArguments) -> dict[str, Any]:
    sets = script_args.eval_datasets
    return {f"eval_datasets[{n}]": e for n, e in sets.items()} if isinstance(sets, dict) else {"eval_datasets": sets}


def changed_fields(arguments: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, for the resolved recipe."""
    default = type(arguments)()
    names = [f.name for f in fields(arguments) if f.init]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) != getattr(default, name)}
