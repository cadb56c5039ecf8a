"""The memory that a run will take, by device and phase, before anything is loaded."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from psutil import virtual_memory
from transformers.training_args import OptimizerNames

from ..assembly import device_map
from ..config import GRPOConfig, mapping
from ..placement import DeviceMap, check_map, is_fsdp
from ..policy import causal_lm, is_packed
from ..policy.loading import from_pretrained_options
from ..policy.reference import reference_options
from ..rewards.loading import is_reward_model
from ..rollouts.native.engine import groups_that_fit
from .dry_run import (
    FakeModel,
    autocast,
    copied_bytes,
    countable_experts,
    generate_bytes,
    reward_bytes,
    rollout_bytes,
    scoring_bytes,
    update_bytes,
)
from .models import (
    PolicySpec,
    policy_of,
    quantization_of,
    quantized,
    reference_of,
    reward_model_of,
    unique_parameters,
    unknown_quantization,
    weights,
)
from .optimizer import is_known, optimizer_bytes, step_bytes

ASSUMED_PROMPT = 512  # tokens, where max_prompt_length does not say

# What is in memory throughout, and in each phase besides
RESIDENT = ("parameters", "optimizer", "frozen models", "kept cache")
PHASES = {
    "rollout": ("key-value cache", "weights for decoding", "decoding", "reward passes"),
    "scoring": ("scoring",),
    "update": ("gradients", "activations"),
}


@dataclass(frozen=True)
class Run:
    """What is planned: the policy, names or paths of the rewards, and the arguments, as `GRPOTrainer` takes them."""

    policy: PolicySpec
    rewards: tuple[str, ...]
    args: GRPOConfig

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.args.max_prompt_length or ASSUMED_PROMPT

    @property
    def optim(self) -> str:
        """The optimizer's name."""
        return OptimizerNames(self.args.optim).value


@dataclass
class DevicePlan:
    """Bytes on one device, by what they are for, and the bytes that there are: free, and in all."""

    available: int
    total: int
    items: Counter[str] = field(default_factory=Counter)

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase."""
        resident = sum(self.items[name] for name in RESIDENT)
        return {phase: resident + sum(self.items[name] for name in names) for phase, names in PHASES.items()}

    @property
    def peak(self) -> int:
        """That of the phase that takes most."""
        return max(self.phases.values())

    @property
    def strain(self) -> float:
        """The peak as a part of what there is; above 1 it does not fit."""
        return self.peak / max(1, self.available)


@dataclass
class Plan:
    """Of each device, by name, and what was assumed."""

    devices: dict[str, DevicePlan]
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        """Whether every device has room for its peak."""
        return self.fullest.strain <= 1

    @property
    def fullest(self) -> DevicePlan:
        """The device whose peak is the largest part of what there is."""
        return max(self.devices.values(), key=lambda device: device.strain)


@countable_experts()
def plan_run(run: Run, memory: int | None = None) -> Plan:
    """The plan of one rank, whose policy is whole on `args.device`.

    Args:
        memory: bytes of each device; default: what is free on it now.

    Raises:
        ValueError, OSError: models, devices or a combination that the trainer would refuse too; a policy whose code
            does not run without numbers.
    """
    args, device = run.args, str(run.args.device)
    devices: dict[str, DevicePlan] = {}
    unknown: list[str] = []

    def on(name: str) -> Counter[str]:
        if name not in devices:
            devices[name] = DevicePlan(*(_free_and_total(name) if memory is None else (memory, memory)))
        return devices[name].items

    with _named(run.policy.path):
        policy = policy_of(run.policy, args)
    own = on(device)
    trained = [p for p in unique_parameters(policy).values() if p.requires_grad]
    quantization = run.policy.quantization_config or quantization_of(from_pretrained_options(args), policy.config)
    own["parameters"] = sum(weights(policy, quantization).values())
    own["gradients"] = sum(p.nbytes for p in trained)
    own["optimizer"] = optimizer_bytes(run.optim, trained)
    fake = FakeModel(policy)
    reference = reference_of(policy, run.policy, args)
    runs_without_numbers = partial(_named, f"{type(policy).__name__} ({policy.name_or_path})")
    with runs_without_numbers():
        update = update_bytes(fake, args, run.prompt_length) + _dequantized(policy, quantization)
        if not args.on_policy or (args.beta and reference is None):
            own["scoring"] = scoring_bytes(fake, args, run.prompt_length)

    for frozen in _frozen_models(run, reference):
        check_map(frozen.model, frozen.where)
        for name, size in _split(weights(frozen.model, frozen.quantization), frozen.where).items():
            on(name)["frozen models"] += size
        items = on(_first(frozen.where))  # its passes are counted where they begin; they come one after the other
        try:
            items[frozen.phase] = max(items[frozen.phase], frozen.pass_bytes(FakeModel(frozen.model)))
        except RuntimeError as error:
            name = f"{type(frozen.model).__name__} ({frozen.model.name_or_path})"
            unknown.append(f"nothing for passes of {name}: it does not run without numbers ({type(error).__name__})")

    own["activations"] = max(update - own["gradients"], step_bytes(run.optim, trained, args.device.type))
    with runs_without_numbers():
        _add_rollout(run, fake, devices[device])
    return Plan(devices, _assumptions(run, policy) + unknown)


@contextlib.contextmanager
def _named(model: str) -> Iterator[None]:
    """Errors of code that looks at numbers, or is TorchScript."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{model} cannot be planned: its code does not run without numbers ({type(error).__name__}: "
            f"{error!s:.200}). `grpo-trl check` runs it on a few completions."
        ) from error


def _free_and_total(device: str) -> tuple[int, int]:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    return virtual_memory().available, virtual_memory().total


@dataclass
class _Frozen:
    """A frozen model, where it is, the item that its passes are in, and their peak given the model on fake tensors."""

    model: Any
    quantization: Any
    where: DeviceMap
    phase: str
    pass_bytes: Callable[[FakeModel], int]


def _frozen_models(run: Run, reference: Any | None) -> Iterator[_Frozen]:
    args = run.args
    if reference is not None:
        options = reference_options(args, run.policy.path)
        yield _Frozen(
            reference,
            quantization_of(options, reference.config),
            device_map(args, "ref_device"),
            "scoring",
            lambda fake: scoring_bytes(fake, args, run.prompt_length),
        )
    phase = "reward passes" if args.reward_overlap else "scoring"
    for path in filter(is_reward_model, run.rewards):
        options, where = mapping(args.reward_model_init_kwargs), device_map(args, "reward_device")
        model = reward_model_of(path, args)
        size = _reward_pass(run, model)
        quantization = quantization_of(options, model.config)
        yield _Frozen(model, quantization, where, phase, lambda fake, size=size: reward_bytes(fake, *size))


def _reward_pass(run: Run, model: Any) -> tuple[int, int]:
    """The rows of a reward model's largest pass, and their tokens."""
    args, length = run.args, run.prompt_length + run.args.max_completion_length
    limits = (args.reward_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    rows = min(args.reward_batch_size, args.completions_per_rank)
    return rows, min(length, *(limit for limit in limits if limit))


def _add_rollout(run: Run, fake: FakeModel, device: DevicePlan) -> None:
    args, model, packed = run.args, causal_lm(fake.model), is_packed(fake.model)
    if args.use_vllm:
        if args.vllm_mode == "colocate":
            item = "key-value cache" if args.vllm_enable_sleep_mode else "kept cache"
            device.items[item] = int(args.vllm_gpu_memory_utilization * device.total)
        return
    on_device = args.device.type
    native = args.rollout_engine == "native" and packed and not mapping(args.generation_kwargs)
    if native:
        device.items["weights for decoding"] = copied_bytes(fake, args, on_device)
    groups = prompts = args.completions_per_rank // args.num_generations
    if args.max_concurrent_rows:
        groups = args.max_concurrent_rows // args.num_generations
    elif native:
        tokens = run.prompt_length + args.num_generations * args.max_completion_length
        free = device.available - sum(device.items[name] for name in (*RESIDENT, "weights for decoding"))
        with autocast(args):
            groups = groups_that_fit(model, tokens, free)
    measure = rollout_bytes if native else generate_bytes
    cache, work = measure(fake, args, run.prompt_length, max(1, min(prompts, groups)))
    device.items["kept cache" if native and args.captures_graphs else "key-value cache"] = cache
    device.items["decoding"] = work


def _assumptions(run: Run, policy: Any) -> list[str]:
    args = run.args
    sharded = args.deepspeed_plugin is not None or is_fsdp()
    said = {
        f"prompts of {ASSUMED_PROMPT} tokens: max_prompt_length is not set": args.max_prompt_length is None,
        f"for optim={run.optim} without its optim_args": bool(args.optim_args),
        f"for optim={run.optim} the memory of AdamW": not is_known(run.optim),
        "the cache of transformers_cb as that of model.generate; it takes what is free": (
            args.rollout_engine == "transformers_cb" and not args.use_vllm
        ),
        "a whole policy on each rank, though DeepSpeed or FSDP may shard it": sharded,
        "padded rows: this model cannot be run on streams of groups": not is_packed(policy),
        f"weights as if they were not quantised by {unknown_quantization(policy.config)}": unknown_quantization(
            policy.config
        ),
    }
    return [text for text, applies in said.items() if applies]


def _split(sizes: dict[str, int], where: DeviceMap) -> dict[str, int]:
    """Bytes by device of tensors that an accelerate device map places; what is on disk is in no memory."""
    result: Counter[str] = Counter()
    for name, size in sizes.items():
        prefixes = [p for p in where if not p or name == p or name.startswith(f"{p}.")]
        result[_name(where[max(prefixes, key=len)] if prefixes else next(iter(where.values())))] += size
    return {name: size for name, size in result.items() if name != "disk"}


def _first(where: DeviceMap) -> str:
    return next((_name(place) for place in where.values() if place != "disk"), "cpu")


def _name(place: Any) -> str:
    name = f"cuda:{place}" if isinstance(place, int) else str(place)
    return "cuda:0" if name == "cuda" else name


def _dequantized(policy: Any, quantization: Any) -> int:
    """A quantised weight is unpacked to be used, one at a time."""
    if quantization is None:
        return 0
    return max((weight.nbytes for weight in quantized(policy).values()), default=0)
