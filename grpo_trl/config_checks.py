"""What a `GRPOConfig` must be, as tables: ranges, names, combinations. What cannot be used is
set back, so that reading goes on."""

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from transformers import Trainer, get_scheduler
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_hqq_available, is_liger_kernel_available, is_optimum_quanto_available

from .algorithm import SAMPLER_CORRECTIONS
from .config_types import set_to_default
from .placement import is_fsdp, is_zero3


class Range(NamedTuple):
    """Numbers from `low` to `high`, `low` itself left out if `above` and `high` if `below`, and None if `or_none`;
    `hint` says what to do instead."""

    low: float
    high: float = math.inf
    above: bool = False
    hint: str = ""
    below: bool = False
    or_none: bool = False

    def __contains__(self, value: Any) -> bool:
        if value is None:
            return self.or_none
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        if self.high < math.inf:
            ends = "(" if self.above else "[", ")" if self.below else "]"
            return f"expected in {ends[0]}{self.low:g}, {self.high:.10g}{ends[1]}{self.hint}"
        return f"expected {'more than' if self.above else 'at least'} {self.low:g}{self.hint}"


# Fields from which the sizes of a rollout follow: nothing can be worked out from wrong ones.
BATCH_RANGES = {
    "per_device_train_batch_size": Range(1),
    "gradient_accumulation_steps": Range(1),
    "steps_per_generation": Range(1),
    "generation_batch_size": Range(1),
    "num_generations": Range(2, hint=", because a group compares its completions"),
}
RANGES = {
    "per_device_eval_batch_size": Range(1),
    "num_iterations": Range(1),
    "temperature": Range(0, above=True, hint=" (use eval_temperature=0 for greedy evaluation)"),
    "top_p": Range(0, 1, above=True),
    "top_k": Range(0, hint=" (0: all tokens)"),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, above=True),
    "max_completion_length": Range(1, hint=" token"),
    "max_prompt_length": Range(1, hint=" token"),
    "skip_solved_after": Range(1, hint=" draw"),
    "skip_hopeless_after": Range(1, hint=" draw"),
    "beta": Range(0),
    "epsilon": Range(0),
    "epsilon_high": Range(0),
    "sapo_temperature_pos": Range(0, above=True),
    "sapo_temperature_neg": Range(0, above=True),
    "vespo_k_pos": Range(0),
    "vespo_lambda_pos": Range(0, above=True),
    "vespo_k_neg": Range(0),
    "vespo_lambda_neg": Range(0, above=True),
    "top_entropy_quantile": Range(0, 1, above=True),
    "entropy_coef": Range(0),
    "dynamic_sampling_max_rounds": Range(1),
    "dynamic_sampling_max_age": Range(0, hint=" (0: surplus groups are not kept)"),
    "dynamic_sampling_tolerance": Range(0, 1),
    "off_policy_mask_threshold": Range(0, above=True, hint=" nats per token"),
    "sampler_correction_min": Range(0),
    "sampler_correction_max": Range(0, above=True, or_none=True),
    "ref_model_mixup_alpha": Range(0, 1),
    "ref_model_sync_steps": Range(1),
    "reward_timeout": Range(0, above=True, hint=" seconds"),
    "reward_batch_size": Range(1),
    "reward_max_length": Range(1, hint=" token"),
    "num_generations_eval": Range(1),
    "eval_temperature": Range(0, hint=" (0: greedy)"),
    "eval_max_completion_length": Range(1, hint=" token"),
    "num_completions_to_print": Range(0),
    "max_concurrent_rows": Range(1, hint=" completion"),
    "max_tokens_per_microbatch": Range(1, hint=" token"),
}
# Of transformers, whose own parts would find out later, or not at all.
TRAINER_RANGES = {
    "num_train_epochs": Range(0, above=True),
    "max_steps": Range(-1, hint=" (-1: num_train_epochs decides)"),
    "learning_rate": Range(0),
    "warmup_steps": Range(0, hint=" (below 1: a share of all steps)"),
    "weight_decay": Range(0),
    "adam_beta1": Range(0, 1, below=True),
    "adam_beta2": Range(0, 1, below=True),
    "adam_epsilon": Range(0, above=True),
    "max_grad_norm": Range(0, hint=" (0: no clipping)"),
    "logging_steps": Range(0, above=True, hint=" (below 1: a share of all steps)"),
    "eval_steps": Range(0, above=True, hint=" (below 1: a share of all steps)"),
    "save_steps": Range(0, above=True, hint=" (below 1: a share of all steps)"),
    "eval_delay": Range(0),
    "save_total_limit": Range(0, hint=" (0: no limit)"),
    "seed": Range(0, 2**32 - 1, hint=", because numpy's generator takes no other"),
    "data_seed": Range(0, 2**32 - 1),
    "torch_empty_cache_steps": Range(1),
    "ddp_timeout": Range(1, hint=" second"),
    "ddp_bucket_cap_mb": Range(1),
}
CHOICES = {
    "prompt_format": ("auto", "chat", "text"),
    "overlong_prompts": ("drop", "truncate", "error"),
    "reward_call": ("batch", "group"),
    "reward_input_format": ("auto", "pair", "chat", "text"),
    "sampler_correction": tuple(SAMPLER_CORRECTIONS),
    "cache_implementation": (*ALL_CACHE_IMPLEMENTATIONS, "paged"),  # as transformers checks it
}
# Dict-valued fields that a word or a file's path may stand for; text in any other is a JSON object.
DICT_OR_WORD = ("accelerator_config", "fsdp_config", "deepspeed", "ref_device", "reward_device")


def value_problems(args: Any, allowed: Mapping[str, Range | Collection[str]]) -> list[str]:
    """Numbers out of their range, and names that are none of those allowed. None is allowed where it is the default:
    another field, or nothing, decides."""
    optional = {field.name for field in fields(args) if field.default is None}
    values = {name: getattr(args, name) for name in allowed}
    return [
        f"{name}={value!r} {_expected(allowed[name])}."
        for name, value in values.items()
        if not ((value is None and name in optional) or value in allowed[name])
    ]


def _expected(allowed: Range | Collection[str]) -> str:
    if isinstance(allowed, Range):
        return f"is out of range: {allowed}"
    return f"is unknown; use one of {', '.join(allowed)}"


def trainer_problems(args: Any) -> list[str]:
    """`value_problems` of TRAINER_RANGES. Those fields are set to their defaults, so that transformers' own checks go
    on."""
    problems = []
    for name, allowed in TRAINER_RANGES.items():
        if found := value_problems(args, {name: allowed}):
            problems += found
            set_to_default(args, name)
    return problems


def steps_in_backward(args: Any) -> bool:
    """Whether the optimizer updates weights while gradients are computed, so that each pass is an update."""
    return args.optim.value in ("lomo", "adalomo") or args.optim.value.endswith("_layerwise")


def optimizer_problems(args: Any) -> list[str]:
    """An optimizer that is not installed, and options that a scheduler does not take: found by making them."""
    problems = []
    parts = [part.split("=") for part in (args.optim_args or "").split(",") if part.strip()]
    if any(len(part) != 2 for part in parts):
        problems.append(f"optim_args={args.optim_args!r} cannot be read; expected key=value,key=value.")
    else:
        try:
            Trainer.get_optimizer_cls_and_kwargs(args)
        except ImportError as error:
            problems.append(f"optim={args.optim.value!r} is not available: {error}")
        except ValueError as error:
            if "need to pass a model" not in str(error):
                problems.append(f"optim={args.optim.value!r}: {error}")
    options = args.lr_scheduler_kwargs
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10, scheduler_specific_kwargs=dict(options or {}))
    except (TypeError, ValueError) as error:
        problems.append(
            f"lr_scheduler_kwargs={options!r} are not what lr_scheduler_type={args.lr_scheduler_type.value!r} takes: "
            f"{error}."
        )
    return problems


Rows = tuple[tuple[Any, str], ...]  # what is wrong, if it holds, and the message


def combination_problems(args: Any) -> list[str]:
    """Values that are right by themselves and cannot work here, or together."""
    rows = (*_of_the_run(args), *_of_liger(args), *_of_pieces_and_shards(args), *_of_the_objective(args))
    return [message for wrong, message in rows if wrong]


def _of_the_run(args: Any) -> Rows:
    processes = os.environ.get("WORLD_SIZE", 1)
    return (
        (
            int(processes) > args.world_size,
            f"the launcher started {processes} processes, but this one finds itself alone and would train by itself; "
            "on CPU ranks set use_cpu: true.",
        ),
        (
            (args.sync_ref_model or args.ref_model_name_or_path) and not args.beta,
            "sync_ref_model and ref_model_name_or_path need the reference, but beta=0 loads none; set beta above 0 or "
            "leave them out.",
        ),
        (
            args.replay_rollouts is not None and args.log_rollouts,
            "replay_rollouts trains on rollouts that are written already; leave log_rollouts out.",
        ),
        (
            args.replay_rollouts is not None and not os.path.isdir(args.replay_rollouts),
            f"replay_rollouts={args.replay_rollouts!r} is no folder; give the folder rollouts/ of the output_dir of a "
            "run with log_rollouts: true.",
        ),
        (
            "offloaded" in (args.cache_implementation or "") and args.device.type == "cpu",
            f"cache_implementation={args.cache_implementation!r} brings keys and values from the CPU to a GPU, and "
            "this run is on the CPU; leave it out.",
        ),
        (
            args.cache_implementation == "quantized" and not (is_optimum_quanto_available() or is_hqq_available()),
            "cache_implementation='quantized' needs optimum-quanto or hqq, and neither is installed; pip install "
            "optimum-quanto, or leave it out.",
        ),
        (
            args.cuda_graphs and args.device.type != "cuda",
            f"cuda_graphs=True needs a CUDA device, and this run is on {args.device}; leave it out.",
        ),
        *(
            (
                "device_map" in (getattr(args, f"{model}_model_init_kwargs") or {}),
                f"{model}_model_init_kwargs has a device_map; set {model}_device instead, which takes such maps too.",
            )
            for model in ("ref", "reward")
        ),
        (
            args.save_on_signal and args.save_only_model,
            "save_on_signal saves what a run needs to go on, which save_only_model leaves out; leave one of them out.",
        ),
        (
            args.dynamic_sampling and args.fp16,
            "dynamic_sampling skips an update without informative groups, which the gradient scaler of fp16 does not "
            "allow; use bf16.",
        ),
        (
            args.metric_for_best_model in ("loss", "eval_loss"),
            f"metric_for_best_model={args.metric_for_best_model!r}: evaluation samples and scores, so there is no "
            "eval_loss; use eval_reward, eval_<set>_reward or another metric of docs/configuration.md, Evaluation.",
        ),
    )


def _of_liger(args: Any) -> Rows:
    liger = args.liger_kernel_config or {}
    return (
        (
            args.use_liger_kernel and not is_liger_kernel_available(),
            "use_liger_kernel=True needs the package liger-kernel: pip install liger-kernel.",
        ),
        (
            args.use_liger_kernel and args.device.type == "cpu",
            "use_liger_kernel=True puts Triton kernels into the layers, and this run is on the CPU; leave it out.",
        ),
        (
            args.use_liger_kernel and liger.get("fused_linear_cross_entropy"),
            "liger_kernel_config: fused_linear_cross_entropy replaces the model's forward, and with it the scores of "
            "the update; leave it out.",
        ),
        (
            args.use_liger_kernel and liger.get("rope", True) and _is_on_cpu(args.ref_device, args.reward_device),
            "use_liger_kernel=True replaces the rotation of all models of the policy's class, also of those on "
            "ref_device='cpu' or reward_device='cpu', where its kernel does not run; set "
            "liger_kernel_config={'rope': False}.",
        ),
    )


def _of_pieces_and_shards(args: Any) -> Rows:
    return (
        (
            args.ddp_static_graph
            and args.world_size > 1
            and (args.gradient_accumulation_steps > 1 or args.max_tokens_per_microbatch),
            "ddp_static_graph=True lets DDP do one backward pass per update only; leave it out, or set "
            "gradient_accumulation_steps=1 and no max_tokens_per_microbatch.",
        ),
        (
            args.max_tokens_per_microbatch and args.deepspeed_plugin is not None,
            "max_tokens_per_microbatch cannot be used with DeepSpeed, whose engine would step with every piece; lower "
            "per_device_train_batch_size and raise gradient_accumulation_steps instead.",
        ),
        (
            args.max_tokens_per_microbatch and steps_in_backward(args),
            f"max_tokens_per_microbatch cannot be used with optim={args.optim.value!r}, which updates the weights in "
            "every backward pass; lower per_device_train_batch_size instead.",
        ),
        (
            args.max_tokens_per_microbatch and is_fsdp(),
            "max_tokens_per_microbatch cannot be used with FSDP: every piece gathers weights from all ranks, and "
            "ranks may have different numbers of pieces; lower per_device_train_batch_size and raise "
            "gradient_accumulation_steps instead.",
        ),
        (
            is_zero3(args.deepspeed_plugin)
            and args.gradient_checkpointing
            and not args.use_vllm
            and not {"every_n_layers", "offload"}.isdisjoint(args.gradient_checkpointing_kwargs or {}),
            "gradient_checkpointing_kwargs every_n_layers and offload cannot be used with ZeRO-3: TRL turns "
            "checkpointing off for a rollout and on again, and does not know them; leave them out.",
        ),
    )


def _of_the_objective(args: Any) -> Rows:
    highest = 1 + (args.epsilon_high or 0)
    return (
        (
            args.surrogate == "cispo" and (args.epsilon_high or 0) < 1,
            f"surrogate cispo bounds the ratio itself by epsilon_high, and {args.epsilon_high} would shrink every "
            "token's weight; set epsilon_high to 1 or more (ScaleRL: 5).",
        ),
        (
            (args.top_entropy_quantile or 1) < 1 and args.max_tokens_per_microbatch,
            "top_entropy_quantile picks tokens from a whole micro-batch, which max_tokens_per_microbatch runs in "
            "pieces; leave one of them out.",
        ),
        (
            args.dynamic_sampling
            and args.dynamic_sampling_tolerance
            and args.dynamic_sampling_filter is None
            and args.multi_objective_aggregation == "normalize_then_sum",
            f"dynamic_sampling_tolerance={args.dynamic_sampling_tolerance} compares with the size of rewards, which "
            "normalize_then_sum brings to the same spread first; set it to 0, or use dynamic_sampling_filter.",
        ),
        (
            args.surrogate == "clip" and args.delta is not None and args.delta <= highest,
            f"delta={args.delta} must be more than 1 + epsilon_high = {highest:g}: it bounds the ratios that the clip "
            "range leaves free, and a lower one would narrow that range; raise it, or leave it out.",
        ),
        (
            args.surrogate == "vespo" and (args.sampler_correction or "").startswith("sequence"),
            f"surrogate vespo weighs a sequence by the ratios of its tokens, and sampler_correction="
            f"{args.sampler_correction!r} gives each token that of its sequence; use token_truncate or token_mask "
            "(with vLLM: vllm_importance_sampling_mode).",
        ),
        (
            (args.sampler_correction or "").endswith("truncate")
            and args.sampler_correction_min is None
            and args.sampler_correction_max is None,
            f"sampler_correction={args.sampler_correction!r} truncates weights to bounds, and there is none; set "
            "sampler_correction_max or sampler_correction_min.",
        ),
        (
            (args.sampler_correction_min or 0) > (args.sampler_correction_max or math.inf),
            f"sampler_correction_min={args.sampler_correction_min} is above sampler_correction_max="
            f"{args.sampler_correction_max}, so that no weight is left; lower it.",
        ),
    )


def _is_on_cpu(*places: str | dict[str, Any] | None) -> bool:
    """Whether one of these devices, or device maps, names the CPU."""
    devices = [device for place in places for device in (place.values() if isinstance(place, dict) else [place])]
    return any(str(device).split(":")[0] == "cpu" for device in devices)


def json_problems(args: Any, dict_fields: list[str]) -> list[str]:
    """Fields that must be a mapping and are none, nor JSON text of one. Those are emptied, so that reading goes on."""
    problems = []
    for name in dict_fields:
        value = getattr(args, name)
        if name == "accelerator_config":
            problems += _accelerator_problems(args)
        if name in DICT_OR_WORD and not (isinstance(value, str) and value.startswith("{")):
            continue
        try:
            parsed, reason = (json.loads(value) if isinstance(value, str) else value), ""
        except json.JSONDecodeError as error:
            parsed, reason = value, f" ({error})"
        if parsed is not None and not isinstance(parsed, dict):
            problems.append(f"{name}={value!r} must be a mapping, as JSON on the command line: '{{...}}'{reason}.")
            setattr(args, name, None)
    return problems


def _accelerator_problems(args: Any) -> list[str]:
    """What keeps `accelerator_config`, a mapping or the path of a JSON file, from being one; it is then emptied."""
    value = args.accelerator_config
    try:
        if isinstance(value, str) and not value.startswith("{"):
            AcceleratorConfig.from_json_file(value)
        elif value and isinstance(value, dict | str):
            AcceleratorConfig(**(json.loads(value) if isinstance(value, str) else value))
    except (TypeError, ValueError, OSError) as error:
        args.accelerator_config = None
        return [f"accelerator_config={value!r} cannot be used: {error}."]
    return []
