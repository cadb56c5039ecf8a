"""Options of vLLM, by TRL's names and with TRL's meanings. All but `use_vllm` act only where vLLM samples."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainingArguments

from .config_checks import Range, value_problems
from .config_types import about

VLLM_RANGES = {
    "vllm_server_port": Range(1, 65535),
    "vllm_group_port": Range(1, 65535),
    "vllm_server_timeout": Range(0, hint=" seconds"),
    "vllm_gpu_memory_utilization": Range(0, 1, above=True),
    "vllm_max_model_length": Range(1, hint=" token"),
    "vllm_tensor_parallel_size": Range(1),
}
VLLM_CHOICES = {
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
}
# Sampling parameters of vLLM that the trainer sets: name -> what to do instead
SET_BY_TRAINER = {
    "n": "num_generations",
    "max_tokens": "max_completion_length",
    "seed": "seed; each draw gets one of its own from it",
    "logprobs": "nothing: those of the sampled tokens come anyway",
    "stop_token_ids": "the tokenizer's and the generation config's EOS tokens",
    "ignore_eos": "the tokenizer's and the generation config's EOS tokens",
    "truncate_prompt_tokens": "max_prompt_length with overlong_prompts",
}


@dataclass
class VLLMArguments(TrainingArguments):
    """The part of `GRPOConfig` that is about vLLM."""

    use_vllm: bool = about("TRL's name for rollout_engine: vllm.", False)
    vllm_mode: str = about("colocate: on the policy's devices; server: a `vllm serve` elsewhere.", "colocate")
    vllm_model_impl: str = about("Colocate: vllm, or transformers for vLLM's wrapper of that model class.", "vllm")
    vllm_enable_sleep_mode: bool = about("Colocate: give vLLM's memory back between rollouts.", False)
    vllm_structured_outputs_regex: str | None = about("Regular expression that completions must match.")
    vllm_server_base_url: str | None = about("Server: its URL; instead of host and port.")
    vllm_server_host: str = about("Server: its host.", "0.0.0.0")
    vllm_server_port: int = about("Server: its port.", 8000)
    vllm_server_timeout: float = about("Server: seconds to wait for it at the start.", 240.0)
    vllm_group_port: int = about("Server: port of the group over which weights are sent.", 51216)
    vllm_gpu_memory_utilization: float = about("Colocate: share of the GPU's memory that vLLM takes.", 0.3)
    vllm_max_model_length: int | None = about("Colocate: longest prompt and completion. Default: the model's own.")
    vllm_tensor_parallel_size: int = about("Colocate: ranks that share a copy of the model.", 1)
    vllm_importance_sampling_correction: bool = about(
        "Where vLLM samples and sampler_correction is not set: correct for its log-probabilities.", True
    )
    vllm_importance_sampling_mode: str = about("The sampler_correction that is then used.", "sequence_mask")
    vllm_importance_sampling_clip_max: float | None = about("The sampler_correction_max that is then used.", 3.0)
    vllm_importance_sampling_clip_min: float | None = about("The sampler_correction_min that is then used.")


def resolve_vllm(args: Any) -> list[str]:
    """Makes `use_vllm` and `rollout_engine` say the same and, where vLLM samples, fills `sampler_correction` by TRL's
    names for it. Returns what is wrong."""
    if args.use_vllm and args.rollout_engine not in (None, "vllm"):
        return [
            f"use_vllm=True and rollout_engine={args.rollout_engine!r} contradict each other; leave one of them out."
        ]
    args.use_vllm = args.use_vllm or args.rollout_engine == "vllm"
    if not args.use_vllm:
        return []
    args.rollout_engine = "vllm"
    problems = value_problems(args, VLLM_RANGES | VLLM_CHOICES)
    args.vllm_server_base_url = args.vllm_server_base_url and args.vllm_server_base_url.rstrip("/")
    if args.sampler_correction is None and args.vllm_importance_sampling_correction:
        problems += _bounds_that_would_be_lost(args)
        args.sampler_correction = args.vllm_importance_sampling_mode
        args.sampler_correction_max = args.vllm_importance_sampling_clip_max
        args.sampler_correction_min = args.vllm_importance_sampling_clip_min
    if args.cache_implementation:
        problems.append("cache_implementation is of model.generate and vLLM has its own cache; leave it out.")
    return problems


def _bounds_that_would_be_lost(args: Any) -> list[str]:
    """Bounds of `sampler_correction` without it: those of TRL's names would silently take their place."""
    defaults = {field.name: field.default for field in fields(args)}
    return [
        f"sampler_correction_{end}={value!r} acts with sampler_correction, which is not set; set that too, or use "
        f"vllm_importance_sampling_clip_{end}."
        for end in ("min", "max")
        if (value := getattr(args, name := f"sampler_correction_{end}")) != defaults[name]
    ]


def vllm_generation_kwargs(args: Any) -> dict[str, Any]:
    """What options of vLLM become of its SamplingParams; {} where it does not sample."""
    if not args.use_vllm or args.vllm_structured_outputs_regex is None:
        return {}
    return {"structured_outputs": {"regex": args.vllm_structured_outputs_regex}}


def vllm_kwargs_problems(args: Any) -> list[str]:
    """`generation_kwargs` that vLLM gets: any of its SamplingParams, but those that the trainer sets or that
    `vllm_generation_kwargs` says otherwise."""
    options = args.generation_kwargs or {}
    twice = [
        f"generation_kwargs {name}={options[name]!r} and vllm_structured_outputs_regex="
        f"{args.vllm_structured_outputs_regex!r} say different things; leave one of them out."
        for name, value in vllm_generation_kwargs(args).items()
        if options.get(name, value) != value
    ]
    return twice + [
        f"generation_kwargs {name} is set by the trainer where vLLM samples; use {SET_BY_TRAINER[name]}."
        for name in options
        if name in SET_BY_TRAINER
    ]


def length_problems(longest: int | None, what: str, args: Any) -> list[str]:
    """Too few tokens (None: unknown) for a prompt and its completion: vLLM cuts completions that do not fit."""
    of_evaluation = args.eval_max_completion_length if args.evaluates else None
    completion = max(args.max_completion_length, of_evaluation or 0)
    needed = (args.max_prompt_length or 1) + completion
    if longest is None or longest >= needed:
        return []
    return [
        f"{what} has room for {longest} tokens, prompt included, and the longest completion has {completion}, "
        f"max_prompt_length {args.max_prompt_length}: completions would be cut. Lower these, or give it {needed} or "
        "more (vllm_max_model_length; of a server: --max-model-len)."
    ]
