"""What the trainer is put together from: checked arguments, tokenizer, sampling parameters, devices, callbacks."""

import os
import pydoc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import get_config_model_id

from .algorithm import informative_groups
from .callbacks import (
    DeviceTableCallback,
    EpochExportCallback,
    LossNoteCallback,
    MetricsPlotCallback,
    PromptMemoryCallback,
    RunDoctorCallback,
    SyncReferenceCallback,
)
from .config import GRPOConfig, mapping
from .placement import DeviceMap, is_zero3, resolve_device_map
from .policy import disable_dropout, freeze_adapter, load_policy, load_reference_model, prepare
from .prompt_memory import PromptMemory
from .prompts import check_prompt_dataset, check_template_kwargs, encode_prompt, first_rows, limit_prompts
from .rewards import check_rewards
from .rewards.registry import TRL_NAMES
from .rewards.rows import RESERVED
from .rollouts import EVAL_STREAM, SamplingParams, check_engine
from .rollouts.dynamic import DynamicSampler, Scored
from .token_limit import TokenLimit

logger = get_logger(__name__)  # of accelerate: speaks on the main process only


def config_for(model: Any, args: Any) -> GRPOConfig:
    """The trainer's `args`; by default those of a run named after the model. Raises TypeError for another class."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return GRPOConfig(f"{Path(name).name or 'model'}-GRPO")
    if not isinstance(args, GRPOConfig):
        raise TypeError(
            f"args is a {type(args).__module__}.{type(args).__qualname__}, expected grpo_trl.GRPOConfig, which "
            "takes the same options; import it with `from grpo_trl import GRPOConfig`."
        )
    return args


def reward_specs(reward_funcs: Any, processing_classes: Any, args: GRPOConfig) -> tuple[list[Any], Any]:
    """One or several `reward_funcs` as a list, with their tokenizers and the overlong penalty where it is on."""
    several = isinstance(reward_funcs, list | tuple)
    specs = list(reward_funcs) if several else [reward_funcs] if reward_funcs else []
    if args.overlong_penalty:
        return with_overlong_penalty(specs, processing_classes, args)
    return specs, processing_classes


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
    with_adapter: bool,
    refused: dict[str, Any],
) -> list[str]:
    """Everything that can be known to be wrong without a tokenizer or a model."""
    found = [
        f"{name} is a TRL argument that is not available here; override GRPOTrainer.rollout (see docs/rollouts.md)."
        for name, value in refused.items()
        if value is not None
    ]
    if args.sync_ref_model and with_adapter:
        found.append(
            "sync_ref_model=True needs a reference model of its own, but a policy with an adapter is its own "
            "reference; set sync_ref_model=False, or train all weights."
        )
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    if evaluates and datasets.keys() == {"train_dataset"}:
        found.append(
            "eval_strategy or eval_on_start asks for evaluation, but there is no eval_dataset; pass one, or set "
            "eval_strategy='no' and eval_on_start=False."
        )
    loaded_reference = args.beta and (args.ref_model_name_or_path or (isinstance(model, str) and not with_adapter))
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
    if is_zero3(args.deepspeed_plugin):
        found += zero3_problems(args.ref_device)
    if isinstance(datasets["train_dataset"], IterableDataset) and args.max_steps <= 0:
        found.append("train_dataset is a stream, whose length is not known; set max_steps.")
    found += _errors_of(
        partial(check_path, model),
        partial(device_map, args, "ref_device"),
        partial(device_map, args, "reward_device"),
        partial(check_engine, args.rollout_engine),
        partial(check_rewards, rewards, reward_processing_classes, args),
        *([partial(filter_named, args.dynamic_sampling_filter)] if args.dynamic_sampling_filter else []),
        *(partial(check_prompt_dataset, dataset, where=name) for name, dataset in datasets.items()),
    )
    return found


def zero3_problems(ref_device: str | dict | None) -> list[str]:
    """What cannot be placed under ZeRO-3, which shards the reference over the ranks."""
    if ref_device in (None, "auto", "same"):
        return []
    return [
        f"ref_device={ref_device!r}: under ZeRO-3 the reference is sharded over the ranks like the policy and has "
        "no device of its own; leave ref_device at auto, or use ZeRO-2."
    ]


def with_overlong_penalty(rewards: list[Any], processing_classes: Any, args: GRPOConfig) -> tuple[list[Any], Any]:
    """Adds the reward `soft_overlong` with weight 1, unless it is there already."""
    if not rewards or any(TRL_NAMES.get(spec, spec) == "soft_overlong" for spec in rewards if isinstance(spec, str)):
        return rewards, processing_classes
    if args.reward_weights is not None and len(args.reward_weights) == len(rewards):
        args.reward_weights = [*args.reward_weights, 1.0]
    if isinstance(processing_classes, Sequence):
        processing_classes = [*processing_classes, None]
    return [*rewards, "soft_overlong"], processing_classes


def prompt_problems(
    datasets: dict[str, Any], tokenizer: Any, chat_options: dict[str, Any], remove_unused_columns: bool | None
) -> list[str]:
    """What is wrong with the first text and the first conversation of each dataset once they meet the tokenizer (no
    chat template, say), with its `chat_template_kwargs`, and with columns named as an argument of every reward."""
    found = []
    for name, dataset in datasets.items():
        rows = first_rows(dataset)
        checks = [partial(encode_prompt, row, tokenizer, **chat_options) for row in rows]
        errors = _errors_of(*checks, partial(check_template_kwargs, dataset))
        found += [f"{name}: {error}" for error in dict.fromkeys(errors)]
        taken = [] if remove_unused_columns else sorted(set(RESERVED) & set(rows[0]))
        if taken:
            found.append(f"{name} has columns {', '.join(taken)}, which rewards get as arguments; rename them.")
    return found


def limit(dataset: Any, tokenizer: Any, chat_options: dict[str, Any], args: GRPOConfig) -> Any:
    """Applies `max_prompt_length` and `overlong_prompts` to a dataset, or to each of several named ones."""
    if isinstance(dataset, dict):
        return {name: limit(part, tokenizer, chat_options, args) for name, part in dataset.items()}
    if dataset is None:
        return None
    return limit_prompts(
        dataset,
        lambda example: len(encode_prompt(example, tokenizer, **chat_options)[0]),
        max_prompt_length=args.max_prompt_length,
        overlong_prompts=args.overlong_prompts,
    )[0]


def policy_limit(args: GRPOConfig, accelerator: Accelerator) -> TokenLimit:
    """Of the policy's passes. They are not cut when memory runs out where other processes take part in them, or where
    tokens are picked from a whole micro-batch."""
    alone = accelerator.distributed_type == DistributedType.NO
    fixed = not alone or args.top_entropy_quantile < 1
    return TokenLimit("the policy", args.max_tokens_per_microbatch, fixed=fixed)


def dynamic_sampler(args: GRPOConfig, world_size: int) -> DynamicSampler:
    """What fills batches with informative groups, by `dynamic_sampling_filter` or by the spread of their rewards."""
    size = args.num_generations
    own = None if args.dynamic_sampling_filter is None else filter_named(args.dynamic_sampling_filter)

    def is_informative(scored: Scored) -> bool:
        if own is not None:
            return bool(own(scored.group, scored.rewards))
        return bool(informative_groups(torch.tensor(scored.rewards), size, args.dynamic_sampling_tolerance)[0])

    return DynamicSampler(
        is_informative,
        max_rounds=args.dynamic_sampling_max_rounds,
        max_age=args.dynamic_sampling_max_age or 0,
        round_size=(args.max_concurrent_rows or 0) // size * world_size,
    )


def prompt_memory(args: GRPOConfig) -> PromptMemory:
    """An empty one, with the rules of `skip_solved_after` and `skip_hopeless_after`."""
    return PromptMemory(skip_solved_after=args.skip_solved_after, skip_hopeless_after=args.skip_hopeless_after)


def filter_named(path: str) -> Callable[..., Any]:
    """The function at a dotted path.

    Raises:
        ValueError: there is none.
    """
    found = pydoc.locate(path)
    if not callable(found):
        raise ValueError(
            f"dynamic_sampling_filter={path!r} leads to {'nothing' if found is None else type(found).__name__}; give "
            "the dotted path of a function (group, rewards) -> bool, its package on sys.path."
        )
    return found


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


def _errors_of(*checks: Callable[[], Any]) -> list[str]:
    errors = []
    for check in checks:
        try:
            check()
        except (ValueError, TypeError, OSError) as error:
            errors.append(str(error))
    return errors


def load_models(
    model: Any, args: GRPOConfig, quantization_config: Any, peft_config: PeftConfig | None
) -> tuple[Any, Any, str | None]:
    """The policy; a reference model of its own, or None; and the name of the frozen adapter that serves as reference.

    Without KL term there is neither. With an adapter that starts from scratch the reference is the policy without it.
    """
    torch.manual_seed(args.seed)  # adapters are initialised at random
    policy = load_policy(model, args, quantization_config=quantization_config, peft_config=peft_config)
    adapter = None
    if isinstance(policy, PeftModel) and peft_config is None and args.beta and not args.ref_model_name_or_path:
        adapter = freeze_adapter(policy)
    path = model if isinstance(model, str) else None
    reference_model = load_reference_model(policy, path, args, device_map(args, "ref_device"))
    if args.disable_dropout:
        disable_dropout(policy)
    if reason := prepare(policy):
        logger.warning(
            f"The policy is run on padded rows, each with its whole prompt, and sampled by model.generate: {reason}."
        )
    if reference_model is not None:
        prepare(reference_model)
    return policy, reference_model, adapter


def load_tokenizer(
    model: Any, args: GRPOConfig, processing_class: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that was passed, or the model's own, with a pad token.

    Raises:
        OSError: the model has none that can be loaded. TypeError: a multimodal processor. ValueError: neither a pad
            nor an EOS token.
    """
    if processing_class is None:
        path = model if isinstance(model, str) else get_config_model_id(model.config)
        try:
            processing_class = AutoTokenizer.from_pretrained(
                path,
                revision=mapping(args.model_init_kwargs).get("revision", "main"),
                trust_remote_code=args.trust_remote_code,
                padding_side="left",
            )
        except (OSError, ValueError) as error:  # of which some do not name the model
            raise OSError(f"model {path!r}: its tokenizer cannot be loaded: {error}") from error
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer (PreTrainedTokenizerBase), got {type(processing_class).__name__}; "
            "multimodal processors are not supported, pass processor.tokenizer."
        )
    if processing_class.pad_token is None and processing_class.eos_token is None:
        raise ValueError("The tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token to one it has.")
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def train_sampling(args: GRPOConfig, policy: Any, tokenizer: Any) -> SamplingParams:
    """Training's sampling. Every EOS id that the model declares ends a completion, and the tokenizer's."""
    declared = policy.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else declared
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos = tuple(dict.fromkeys([*own, *declared]))
    if not eos:
        raise ValueError(
            "Neither the tokenizer nor the model's generation config has an EOS token, so no completion could end; "
            "set tokenizer.eos_token."
        )
    params = SamplingParams(
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        eos_token_ids=eos,
        pad_token_id=tokenizer.pad_token_id,
        seed=args.seed,
        generation_kwargs=mapping(args.generation_kwargs),
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    if params.truncates:
        logger.warning(
            "top_p, top_k, min_p, repetition_penalty or generation_kwargs change the sampling distribution: the "
            "log-probabilities of the update are not those that sampled, and the importance ratio leaves out the kept "
            "mass. Set top_p=1, top_k=0, min_p=None, repetition_penalty=1 and no generation_kwargs for an exact ratio."
        )
    return params


def eval_sampling(args: GRPOConfig, train: SamplingParams) -> SamplingParams:
    """Evaluation's own numbers; without a temperature of its own, that of training."""
    return replace(
        train,
        stream=EVAL_STREAM,
        num_generations=args.num_generations_eval or args.num_generations,
        temperature=train.temperature if args.eval_temperature is None else args.eval_temperature,
        max_completion_length=args.eval_max_completion_length or train.max_completion_length,
    )


FROZEN_DEVICES = ("ref_device", "reward_device")  # in the order in which `auto` deals spare GPUs out to them


def device_map(args: GRPOConfig, name: str) -> DeviceMap:
    """`ref_device` or `reward_device`, resolved on this machine.

    Raises:
        ValueError: see `resolve_device_map`; it begins with the name.
    """
    try:
        return resolve_device_map(
            getattr(args, name),
            args.device,
            num_gpus=torch.cuda.device_count(),
            num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            number=FROZEN_DEVICES.index(name),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def default_callbacks(trainer: Any, reference_model: nn.Module | None) -> list[TrainerCallback]:
    """What a run shows and leaves behind, as configured."""
    args: GRPOConfig = trainer.args
    weights = dict(zip(trainer.reward_names, trainer.reward_weights.tolist(), strict=True))
    callbacks: list[TrainerCallback] = [
        _EpochOfLoader(trainer),
        DeviceTableCallback(trainer),
        LossNoteCallback(),
        PromptMemoryCallback(trainer),
        RunDoctorCallback(weights),
    ]
    if args.plot_metrics:
        callbacks.append(MetricsPlotCallback())
    if args.save_epochs:
        callbacks.append(EpochExportCallback(trainer))
    if args.sync_ref_model:
        mixup, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
        callbacks.append(SyncReferenceCallback(reference_model, mixup, every))
    return callbacks


class _EpochOfLoader(TrainerCallback):
    """`state.epoch` from the loader's position: transformers counts it from the resume when no batch is skipped."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        loader = self.trainer.loader
        streaming = loader.source.num_prompts is None
        state.epoch = state.global_step / state.max_steps if streaming else loader.position / len(loader)
