"""`grpo-trl train --config recipe.yaml [--field value ...]`: from a recipe to a trained model, with `plan` to the
memory that it takes, and with `check` to a self-test."""

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from datasets import Dataset, load_dataset
from rich.console import Console
from transformers.utils import logging
from trl.scripts.utils import ScriptArguments as TRLScriptArguments
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from .assembly import reward_specs
from .checkpoint import check_resumable
from .config import GRPOConfig, mapping
from .config_types import type_problems
from .data import load_datasets, parse_entries
from .manifest import ResumeError
from .refused import raise_all, refuse
from .rollouts import check_engine
from .trainer_checks import errors_of, model_problems

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
    of_adapters = [name for name in _changed(model_args) if name.startswith(("lora_", "use_rslora", "use_dora"))]
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


# ---- train ----


@contextlib.contextmanager
def _said(*more: type[Exception]) -> Iterator[None]:
    """What is wrong with a recipe, its data or its models is the user's to put right, and the message says how. An
    error of training itself keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, yaml.YAMLError, *more) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


def train(argv: Sequence[str]) -> None:
    """Trains as a recipe says, saves the model to output_dir, and pushes it if asked to."""
    with _said():
        script_args, args, model_args = parse_recipe(argv)
        if args.resume_from_checkpoint:
            check_resumable(args.resume_from_checkpoint, Path(str(args.output_dir)))
        trainer = make_trainer(script_args, args, model_args)
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except ResumeError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def make_trainer(script_args: ScriptArguments, args: GRPOConfig, model_args: ModelConfig):
    """The `GRPOTrainer` of a recipe. Data come first: what is wrong with them shows before any model is loaded."""
    from .trainer import GRPOTrainer

    train_dataset, eval_dataset = load_data(script_args, args)
    # with the model_init_kwargs of the recipe, not the resolved ones, which would win over a later `--dtype`
    recipe = _changed(script_args) | _changed(model_args) | {"model_init_kwargs": args.model_init_kwargs}
    if script_args.env:
        recipe["env"] = list(script_args.env)  # values may be secrets
    args.model_init_kwargs = _model_init_kwargs(args, model_args)
    trainer = GRPOTrainer(
        model=str(model_args.model_name_or_path),
        reward_funcs=list(script_args.rewards),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.recipe = recipe
    return trainer


def load_data(script_args: ScriptArguments, args: GRPOConfig) -> tuple[Any, Any]:
    """Training set and evaluation set: None without evaluation, a dict for named ones."""

    def load(where: str, entries: Any, split: str) -> Any:
        if entries:
            return _load_entries(where, entries, args.seed)
        name: Any = script_args.dataset_name
        streaming: Any = script_args.dataset_streaming
        return load_dataset(name, script_args.dataset_config, split=split, streaming=streaming)

    train = load("train_datasets", script_args.train_datasets, script_args.dataset_train_split)
    sets: Any = script_args.eval_datasets
    if not args.evaluates:
        return train, None
    if isinstance(sets, dict):
        named = {name: _load_entries(f"eval_datasets[{name}]", entries, args.seed) for name, entries in sets.items()}
        return train, named
    return train, load("eval_datasets", sets, script_args.dataset_test_split)


def _load_entries(where: str, entries: Any, seed: int) -> Dataset:
    try:
        return load_datasets(entries, seed=seed)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


def _named_eval_sets(script_args: ScriptArguments) -> dict[str, Any]:
    sets = script_args.eval_datasets
    return {f"eval_datasets[{n}]": e for n, e in sets.items()} if isinstance(sets, dict) else {"eval_datasets": sets}


def _model_init_kwargs(args: GRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """How the policy is loaded, as in TRL's script: `model_init_kwargs` wins over the fields of `ModelConfig`."""
    named = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    return named | mapping(args.model_init_kwargs)


def _changed(arguments: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, for the resolved recipe."""
    default = type(arguments)()
    names = [f.name for f in fields(arguments) if f.init]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) != getattr(default, name)}


# ---- plan ----


def plan(argv: Sequence[str]) -> None:
    """Shows the memory that a recipe will take, from configurations alone. Ends with code 1 if it does not fit."""
    from .memory import PolicySpec, Run, advice_lines, parse_size, plan_run, plan_table, ranked_changes

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--memory")
    options, rest = own.parse_known_args(argv)
    with _said(ImportError):
        memory = None if options.memory is None else parse_size(options.memory)
        script_args, args, model_args = parse_recipe(rest, "grpo-trl plan", "[--memory 24GiB] ")
        path, adapter = str(model_args.model_name_or_path), get_peft_config(model_args)
        rewards, _ = reward_specs(list(script_args.rewards), None, args)
        found = model_problems(path, args, rewards, None, adapter is not None)
        raise_all(found if args.use_vllm else found + errors_of(partial(check_engine, args.rollout_engine)))
        args.model_init_kwargs = _model_init_kwargs(args, model_args)
        run = Run(PolicySpec(path, get_quantization_config(model_args), adapter), tuple(script_args.rewards), args)
        planned = plan_run(run, memory)
        ranked = ranked_changes(run, planned, memory)
    console = Console(highlight=False)
    console.print(plan_table(planned))
    for assumption in planned.assumptions:
        console.print(f"Assumed: {assumption}.", soft_wrap=True)
    for line in advice_lines(planned, ranked):
        console.print(line, soft_wrap=True)
    if not planned.fits:
        raise SystemExit(1)


# ---- check ----


def check(argv: Sequence[str]) -> None:
    """Tries a recipe's model, data and rewards on a few completions; trains nothing and keeps nothing. Ends with code
    1 if there is something to fix."""
    from .selfcheck import check_table, reward_table, run_checks, shortened, verdict
    from .trainer_checks import check_services

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--model", dest="model_name_or_path")
    options, rest = own.parse_known_args(argv)
    if options.model_name_or_path is not None:
        rest += ["--model_name_or_path", options.model_name_or_path]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _said():
        script_args, args, model_args = parse_recipe(rest, "grpo-trl check", "[--model PATH] ")
        check_services(args)
        results, trial = run_checks(make_trainer(script_args, shortened(args, folder), model_args))
    console = Console(highlight=False)
    console.print(check_table(results))
    if results["rewards"].passed:
        console.print(reward_table(trial))
    lines, ready = verdict(results)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    if not ready:
        raise SystemExit(1)


# A new subcommand is one entry: name -> (function of the remaining arguments, what it does).
COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (train, "train as a recipe says: grpo-trl train --config recipe.yaml [--field value ...]"),
    "plan": (
        plan,
        "say what memory that takes, and whether it fits: grpo-trl plan --config recipe.yaml [--memory 24GiB]",
    ),
    "check": (
        check,
        "try model, data and rewards in a few minutes: grpo-trl check --config recipe.yaml [--model path]",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The `grpo-trl` command."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        "grpo-trl",
        usage="grpo-trl COMMAND [arguments]",
        epilog="\n".join(f"{name}: {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="`grpo-trl COMMAND --help` lists its arguments")
    command = parser.parse_args(argv[:1]).command
    COMMANDS[command][0](argv[1:])


if __name__ == "__main__":
    main()
