"""What `grpo-trl` can do: `train`, `plan` and `check`, each a function of the rest of the command line."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from rich.console import Console
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from .assembly import reward_specs
from .checkpoint import check_resumable
from .config import GRPOConfig, mapping
from .data import load_datasets
from .manifest import ResumeError
from .recipe import ScriptArguments, changed_fields, parse_recipe
from .refused import raise_all
from .rollouts import check_engine
from .trainer_checks import errors_of, model_problems


@contextlib.contextmanager
def _said(*more: type[Exception]) -> Iterator[None]:
    """What is wrong with a recipe, its data or its models is the user's to put right, and the message says how. An
    error of training itself keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, yaml.YAMLError, *more) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


# ---- train ----


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
    recipe = changed_fields(script_args) | changed_fields(model_args) | {"model_init_kwargs": args.model_init_kwargs}
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


def _model_init_kwargs(args: GRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """How the policy is loaded, as in TRL's script: `model_init_kwargs` wins over the fields of `ModelConfig`."""
    named = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    return named | mapping(args.model_init_kwargs)


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
