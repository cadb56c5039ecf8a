"""What the trainer is put together from: arguments, tokenizer, models, sampling parameters, devices, callbacks."""

import pydoc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, get_int_from_env
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.liger import apply_liger_kernel
from trl.trainer.utils import get_config_model_id

from .algorithm import informative_groups, relative_rewards
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
from .config_checks import steps_in_backward
from .placement import DeviceMap, is_zero3, resolve_device_map
from .policy import (
    causal_lm,
    disable_dropout,
    freeze_adapter,
    load_policy,
    load_reference_model,
    needs_frozen_adapter,
    prepare,
)
from .policy.support import dynamic_rope, dynamic_rope_begins, padding_gap
from .prompt_memory import PromptMemory
from .prompts import encode_prompt, limit_prompts
from .rewards import RewardScorer, load_rewards
from .rewards.registry import TRL_NAMES
from .rollouts import EVAL_STREAM, RolloutEngine, SamplingParams, make_engine
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
    specs = list(reward_funcs) if several else [] if reward_funcs in (None, "") else [reward_funcs]
    if args.overlong_penalty:
        return with_overlong_penalty(specs, processing_classes, args)
    return specs, processing_classes


def with_overlong_penalty(rewards: list[Any], processing_classes: Any, args: GRPOConfig) -> tuple[list[Any], Any]:
    """Adds the reward `soft_overlong` with weight 1, unless it is there already."""
    if not rewards or any(TRL_NAMES.get(spec, spec) == "soft_overlong" for spec in rewards if isinstance(spec, str)):
        return rewards, processing_classes
    if args.reward_weights is not None and len(args.reward_weights) == len(rewards):
        args.reward_weights = [*args.reward_weights, 1.0]
    if isinstance(processing_classes, Sequence):
        processing_classes = [*processing_classes, None]
    return [*rewards, "soft_overlong"], processing_classes


def without_overlong(
    dataset: Any, tokenizer: Any, chat_options: dict[str, Any], args: GRPOConfig, *, where: str
) -> Any:
    """Applies `max_prompt_length` and `overlong_prompts` to a dataset, or to each of several named ones. Messages call
    it `where`."""
    if isinstance(dataset, dict):
        return {
            name: without_overlong(part, tokenizer, chat_options, args, where=f"{where} {name!r}")
            for name, part in dataset.items()
        }
    if dataset is None:
        return None
    return limit_prompts(
        dataset,
        lambda example: len(encode_prompt(example, tokenizer, **chat_options)[0]),
        max_prompt_length=args.max_prompt_length,
        overlong_prompts=args.overlong_prompts,
        where=where,
    )


def chat_options(args: GRPOConfig) -> dict[str, Any]:
    """How conversations become text."""
    return {
        "prompt_format": args.prompt_format,
        "system_prompt": args.system_prompt,
        "chat_template_kwargs": mapping(args.chat_template_kwargs),
    }


def reward_scorer(specs: list[Any], processing_classes: Any, args: GRPOConfig) -> RewardScorer:
    """The rewards, their models loaded, and how they are called."""
    return RewardScorer(
        load_rewards(specs, processing_classes, args, device_map(args, "reward_device")),
        weights=args.reward_weights,
        timeout=args.reward_timeout,
        per_group=args.reward_call == "group",
        overlap=args.reward_overlap,
    )


def rollout_engine(policy: Any, args: GRPOConfig, accelerator: Accelerator) -> RolloutEngine:
    """What samples from the policy, as configured."""
    return make_engine(
        args.rollout_engine,
        policy,
        sharded=is_zero3(args.deepspeed_plugin) and not args.ds3_gather_for_generation,
        max_concurrent_rows=args.max_concurrent_rows,
        cache_implementation=args.cache_implementation,
        cuda_graphs=args.captures_graphs,
        args=args,
        accelerator=accelerator,
    )


def policy_limit(args: GRPOConfig, accelerator: Accelerator, engine: Any) -> TokenLimit:
    """Of the policy's passes, before whose first cut the native engine gives up what it keeps. They are not cut when
    memory runs out where other processes take part in them, or where tokens are picked from a whole micro-batch; nor
    where each is an update."""
    alone = accelerator.distributed_type == DistributedType.NO
    fixed = not alone or args.top_entropy_quantile < 1 or steps_in_backward(args)
    release = getattr(engine, "release", None)
    return TokenLimit("the policy", args.max_tokens_per_microbatch, fixed=fixed, release=release)


def dynamic_sampler(args: GRPOConfig, sampling: SamplingParams, world_size: int) -> DynamicSampler:
    """What fills batches with informative groups, by `dynamic_sampling_filter` or by the spread of their rewards and
    whether a completion with an advantage has a token in the loss.

    It carries none over where sampling truncates: their log-probabilities are not the policy's, and later nobody knows
    what those were.
    """
    size = args.num_generations
    own = None if args.dynamic_sampling_filter is None else filter_named(args.dynamic_sampling_filter)

    def is_informative(scored: Scored) -> bool:
        if own is not None:
            return bool(own(scored.group, scored.rewards))
        rewards = torch.tensor(scored.rewards)
        counting = scored.group.in_loss(mask_truncated_completions=bool(args.mask_truncated_completions))
        learned = relative_rewards(rewards[None].double())[0, [any(mask) for mask in counting]]
        return bool(learned.any() and informative_groups(rewards, size, args.dynamic_sampling_tolerance)[0])

    return DynamicSampler(
        is_informative,
        max_rounds=args.dynamic_sampling_max_rounds,
        max_age=0 if sampling.truncates else args.dynamic_sampling_max_age or 0,
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


def load_models(
    model: Any, args: GRPOConfig, quantization_config: Any, peft_config: PeftConfig | None
) -> tuple[Any, Any, str | None]:
    """The policy; a reference model of its own, or None; and the name of the frozen adapter that serves as reference.

    Without KL term there is neither. With an adapter that begins as nothing the reference is the policy without it.
    """
    torch.manual_seed(args.seed)  # adapters are initialised at random
    policy = load_policy(model, args, quantization_config=quantization_config, peft_config=peft_config)
    adapter = None
    if isinstance(policy, PeftModel):
        config = policy.peft_config[str(policy.active_adapter)]
        if needs_frozen_adapter(args, config, is_new=peft_config is not None):
            adapter = freeze_adapter(policy)
    path = model if isinstance(model, str) else None
    reference_model = load_reference_model(policy, path, args, device_map(args, "ref_device"))
    if args.disable_dropout:
        disable_dropout(policy)
    if reason := prepare(policy, args.device.type):  # where an instance will be when it is trained
        logger.warning(
            f"The policy is run on padded rows, each with its whole prompt, and sampled by model.generate: {reason}."
        )
    if (gap := padding_gap(policy)) is not None:
        logger.warning(
            f"In {type(causal_lm(policy)).__name__} padding or explicit positions change log-probabilities, by "
            f"{gap:.2g} nats: updates are of another model than the one that reads a row alone."
        )
    config = causal_lm(policy).config.get_text_config()
    longest, begins = (args.max_prompt_length or 0) + args.max_completion_length, dynamic_rope_begins(config)
    if begins is not None and longest > begins:
        logger.warning(
            f"Beyond {begins} tokens the positions of this model ({dynamic_rope(config)} RoPE) depend on the longest "
            "row of a pass, so that the log-probabilities of sampling and of the update differ. Keep "
            "max_prompt_length + max_completion_length at or below that, or set sampler_correction."
        )
    if reference_model is not None:
        prepare(reference_model)
        if args.use_liger_kernel and reference_model.device.type != "cpu":
            apply_liger_kernel(reference_model, args.liger_kernel_config)  # the policy: in `train`
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
    if len(processing_class) <= len(processing_class.all_special_tokens):
        raise ValueError(
            f"The tokenizer of {processing_class.name_or_path!r} has special tokens only: its files (tokenizer.json, "
            "tokenizer_config.json) are not there; save them beside the weights, or pass processing_class."
        )
    if processing_class.pad_token is None and processing_class.eos_token is None:
        raise ValueError("The tokenizer has neither a pad nor an EOS token; set tokenizer.pad_token to one it has.")
    if processing_class.pad_token is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def declared_eos(policy: Any) -> list[int]:
    """The EOS ids of a model's generation config."""
    declared = causal_lm(policy).generation_config.eos_token_id
    return [] if declared is None else [declared] if isinstance(declared, int) else list(declared)


def train_sampling(args: GRPOConfig, policy: Any, tokenizer: Any) -> SamplingParams:
    """Training's sampling. Every EOS id that the model declares ends a completion, and the tokenizer's."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos = tuple(dict.fromkeys([*own, *declared_eos(policy)]))
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
            num_local_ranks=_num_local_ranks(args.world_size),
            number=FROZEN_DEVICES.index(name),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _num_local_ranks(world_size: int) -> int:
    """Ranks on this machine. Where the launcher (srun, say) does not tell: one per GPU, if there are so many."""
    names = (
        *("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),  # torchrun, DeepSpeed
        *("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE"),  # kinds of mpirun
    )
    return get_int_from_env(names, min(world_size, max(1, torch.cuda.device_count())))


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
        assert reference_model is not None  # `reference_problems`
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
