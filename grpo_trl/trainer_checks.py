"""What `GRPOTrainer` refuses before it loads a model."""

import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import get_token
from transformers.integrations import get_reporting_integration_callbacks

from .assembly import device_map, filter_named
from .config import GRPOConfig, mapping
from .evaluation import check_set_names
from .placement import is_zero3
from .policy import holds_adapter
from .policy.reference import reference_options
from .prompts import check_prompt_dataset, check_template_kwargs, encode_prompt, first_rows
from .rewards import check_rewards
from .rewards.loading import check_config
from .rewards.registry import reads_gold
from .rewards.rows import RESERVED
from .rollouts import check_engine
from .rollouts.transformers_cb import check_options


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Every dataset under the name that messages use for it."""
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset {name!r}": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        datasets["eval_dataset"] = eval_dataset
    return datasets


def problems(
    model: Any,
    args: GRPOConfig,
    rewards: list[Any],
    reward_processing_classes: Any,
    datasets: dict[str, Any],
    sets: Iterable[Any],
    with_adapter: bool,
    refused: dict[str, Any],
) -> list[str]:
    """Everything that can be known to be wrong without a tokenizer or a model."""
    found = [
        f"{name} is a TRL argument that is not available here; override GRPOTrainer.rollout (see docs/rollouts.md)."
        for name, value in refused.items()
        if value not in (None, [])
    ]
    if args.evaluates and datasets.keys() == {"train_dataset"}:
        found.append(
            "eval_strategy or eval_on_start asks for evaluation, but there is no eval_dataset; pass one, or set "
            "eval_strategy='no' and eval_on_start=False."
        )
    named = list(sets)
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if named and best.startswith("rewards/"):
        found.append(
            f"metric_for_best_model={args.metric_for_best_model!r}: with several eval sets each has its own; set "
            f"eval_{named[0]}_{best}, say."
        )
    found += gold_problems(rewards, list(datasets.values()), args.remove_unused_columns)
    if isinstance(datasets["train_dataset"], IterableDataset) and args.max_steps <= 0:
        found.append("train_dataset is a stream, whose length is not known; set max_steps.")
    found += model_problems(model, args, rewards, reward_processing_classes, with_adapter)
    return found + errors_of(
        partial(check_output_dir, args.output_dir),
        partial(check_services, args),
        partial(check_set_names, sets, args.log_completions),
        partial(check_engine, args.rollout_engine),
        *(partial(check_prompt_dataset, dataset, where=name) for name, dataset in datasets.items()),
    )


def model_problems(
    model: Any, args: GRPOConfig, rewards: list[Any], reward_processing_classes: Any, with_adapter: bool
) -> list[str]:
    """What is wrong with the models, their devices and the rewards. `with_adapter`: the policy is given one here."""
    has_adapter = with_adapter or (isinstance(model, str) and holds_adapter(model))
    found = reference_problems(model, args, has_adapter)
    if hasattr(model, "_orig_mod"):
        found.append(
            "model was compiled by torch.compile(model), under which its weights are saved by other names; pass the "
            "model itself, with torch_compile=True or after model.compile()."
        )
    if isinstance(model, str) and with_adapter and holds_adapter(model):
        found.append(
            f"model {model!r} has an adapter already, beside which peft_config (use_peft) would put another: leave it "
            "out to train that adapter, or merge it first (model.merge_and_unload())."
        )
    if not isinstance(model, str) and not model.can_generate():
        found.append(
            f"model is a {type(model).__name__}, which cannot generate text; pass a causal LM, or a path to one."
        )
    if not has_adapter and holds_adapter(args.output_dir or "."):
        found.append(
            f"output_dir={args.output_dir!r} holds an adapter, which would be loaded instead of the weights that are "
            "saved there; name another folder."
        )
    if is_zero3(args.deepspeed_plugin):
        found += zero3_problems(args.ref_device)
    return found + errors_of(
        partial(check_path, model),
        partial(check_architecture, model, "model"),
        partial(check_reference, model, args),
        partial(device_map, args, "ref_device"),
        partial(device_map, args, "reward_device"),
        partial(_check_sampling_options, args),
        partial(check_rewards, rewards, reward_processing_classes, args),
        *([partial(filter_named, args.dynamic_sampling_filter)] if args.dynamic_sampling_filter else []),
    )


def reference_problems(model: Any, args: GRPOConfig, has_adapter: bool) -> list[str]:
    """Options of a reference that this run does not load, or does not have."""
    found = []
    if args.sync_ref_model and has_adapter:
        found.append(
            "sync_ref_model=True needs a reference model of its own, but a policy with an adapter is its own "
            "reference; set sync_ref_model=False, or train all weights."
        )
    loaded_reference = args.beta and (args.ref_model_name_or_path or (isinstance(model, str) and not has_adapter))
    if args.ref_model_init_kwargs and not loaded_reference:
        found.append(
            "ref_model_init_kwargs has no effect: no reference is loaded from a path here; set "
            "ref_model_name_or_path (and beta above 0), or leave it out."
        )
    if args.sync_ref_model and "quantization_config" in mapping(args.ref_model_init_kwargs):
        found.append(
            "sync_ref_model=True mixes the policy into the reference's weights, which quantised ones do not allow; "
            "leave quantization_config out of ref_model_init_kwargs, or set sync_ref_model=False."
        )
    return found


def gold_problems(rewards: list[Any], datasets: list[Any], remove_unused_columns: bool | None) -> list[str]:
    """Rewards that compare with a gold answer, where no set has any: they would say nothing about any completion."""
    reading = [reward if isinstance(reward, str) else reward.__name__ for reward in rewards if reads_gold(reward)]
    known = all(isinstance(dataset, Dataset) and len(dataset) for dataset in datasets)  # rows of a list may differ
    if not reading or not known:
        return []
    # of a transform, what it gives
    of_sets = [["prompt"] if remove_unused_columns else list(dataset[0]) for dataset in datasets]
    columns = of_sets[0]
    if {"answer", "solution"} & {column for each in of_sets for column in each}:
        return []
    return [
        f"{' and '.join(reading)}: train_dataset has neither a column 'answer' nor 'solution' to compare with; its "
        f"columns are {', '.join(columns)}{' (remove_unused_columns=True)' if remove_unused_columns else ''}. Rename "
        "the right one with dataset.rename_column(name, 'answer') (in a recipe: output), or use another reward."
    ]


def zero3_problems(ref_device: str | dict | None) -> list[str]:
    """What cannot be placed under ZeRO-3, which shards the reference over the ranks."""
    if ref_device in (None, "auto", "same"):
        return []
    return [
        f"ref_device={ref_device!r}: under ZeRO-3 the reference is sharded over the ranks like the policy and has "
        "no device of its own; leave ref_device at auto, or use ZeRO-2."
    ]


def _check_sampling_options(args: GRPOConfig) -> None:
    if args.rollout_engine == "transformers_cb":
        check_options(args.repetition_penalty, mapping(args.generation_kwargs))


def check_output_dir(output_dir: str | None) -> None:
    """Raises OSError where nothing can be written."""
    path = Path(output_dir or ".").absolute()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output_dir={output_dir!r}: {there} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"output_dir={output_dir!r}: {there} cannot be written to; name another folder.")


def check_services(args: GRPOConfig) -> None:
    """Raises ValueError for a tracker that transformers does not know or that is not installed, and for the Hub
    without a token."""
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"report_to={args.report_to!r}: {error}") from error
    if args.push_to_hub and args.process_index == 0 and not (args.hub_token or get_token()):
        raise ValueError("push_to_hub=True needs a token: run `hf auth login`, or set hub_token or HF_TOKEN.")


def check_architecture(model: Any, name: str) -> None:
    """Raises ValueError for a folder whose model is a classifier, as reward models are."""
    config = Path(model, "config.json") if isinstance(model, str) else None
    if config is None or not config.is_file():
        return
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    if any("ForSequenceClassification" in architecture for architecture in architectures):
        raise ValueError(
            f"{name} {model!r} is a {architectures[0]}, which cannot generate text; give a causal LM. A reward model "
            "goes into reward_funcs."
        )


def check_reference(model: Any, args: GRPOConfig) -> None:
    """Raises ValueError for a `ref_model_name_or_path` that cannot be loaded, is a classifier or has an adapter
    alone."""
    path = args.ref_model_name_or_path
    if path is None:
        return
    check_architecture(path, "ref_model_name_or_path")
    if holds_adapter(path):
        raise ValueError(
            f"ref_model_name_or_path={path!r} has an adapter and no model: merge it into its base "
            "(model.merge_and_unload()), save that, and give its path."
        )
    options = reference_options(args, model if isinstance(model, str) else None)
    check_config(path, f"ref_model_name_or_path={path!r}", options, args)


def check_path(model: Any) -> None:
    """Raises FileNotFoundError for a model that can only be a path, not an id of the Hub, and does not exist."""
    if not isinstance(model, str):
        return
    is_path = model.startswith((".", "~", os.sep)) or model.count("/") > 1
    if is_path and not os.path.exists(model):
        raise FileNotFoundError(
            f"model {model!r}: no such folder (current directory: {os.getcwd()}); give the path of a saved model, or "
            "an id of the Hub (organisation/name)."
        )


def prompt_problems(
    datasets: dict[str, Any], tokenizer: Any, chat_options: dict[str, Any], remove_unused_columns: bool | None
) -> list[str]:
    """What is wrong with the first text and the first conversation of each dataset once they meet the tokenizer (no
    chat template, say), with its `chat_template_kwargs`, and with columns of images or named as an argument of every
    reward."""
    found = []
    for name, dataset in datasets.items():
        rows = first_rows(dataset)
        checks = [partial(encode_prompt, row, tokenizer, **chat_options) for row in rows]
        errors = errors_of(*checks, partial(check_template_kwargs, dataset))
        found += [f"{name}: {error}" for error in dict.fromkeys(errors)]
        taken = [] if remove_unused_columns else sorted(set(RESERVED) & set(rows[0]))
        if taken:
            found.append(f"{name} has columns {', '.join(taken)}, which rewards get as arguments; rename them.")
        if images := sorted({"image", "images"} & set(rows[0])):
            found.append(
                f"{name} has the column {' and '.join(images)}, which the policy would not see: prompts are text. "
                "Train a vision model with TRL, or rename or remove the column."
            )
    return found


def errors_of(*checks: Callable[[], Any]) -> list[str]:
    """What checks say of what is wrong."""
    errors = []
    for check in checks:
        try:
            check()
        except (ValueError, TypeError, OSError) as error:
            errors.append(str(error))
    return errors
