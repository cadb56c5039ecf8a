"""The memory that a run will take, by device and phase, before anything is loaded."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from psutil import virtual_memory

from ..assembly import device_map
from ..config import GRPOConfig, mapping
from ..placement import DeviceMap
from ..policy import causal_lm, is_packed
from ..rewards.loading import is_reward_model
from ..rollouts.native.engine import LOW_PRECISION_ON, key_value_bytes
from . import dry_run
from .models import PolicySpec, policy_of, quantized, reference_of, reward_model_of, unique_parameters, weights
from .optimizer import is_known, optimizer_bytes, step_bytes

ASSUMED_PROMPT = 512  # tokens, where max_prompt_length does not say

# What is in memory throughout, and in each phase besides
RESIDENT = ("parameters", "optimizer", "frozen models", "kept cache")
PHASES = {
    "rollout": ("key-value cache", "16-bit copies", "decoding"),
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


@dataclass
class DevicePlan:
    """Bytes on one device, by what they are for, and the bytes that there are."""

    available: int
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
    def fits(self) -> bool:
        """Whether the peak is within what there is."""
        return self.peak <= self.available


@dataclass
class Plan:
    """Of each device, by name, and what was assumed."""

    devices: dict[str, DevicePlan]
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return all(device.fits for device in self.devices.values())

    @property
    def strain(self) -> float:
        """Peak over available, of the device where it is highest."""
        return max(device.peak / max(1, device.available) for device in self.devices.values())


class Planner:
    """Makes plans. What was run dry for one is not run again for another that differs elsewhere.

    Args:
        memory: bytes of each device; default: what is free on it now.
    """

    def __init__(self, memory: int | None = None):
        self.memory = memory
        self._runs: dict[Any, Any] = {}

    def plan(self, run: Run) -> Plan:
        """Of one rank, whose policy is whole on `args.device`.

        Raises:
            ValueError, OSError: models, devices or a combination that the trainer would refuse too.
        """
        args, device = run.args, str(run.args.device)
        devices: dict[str, DevicePlan] = {}

        def on(name: str) -> Counter[str]:
            return devices.setdefault(name, DevicePlan(self.available(name))).items

        policy = policy_of(run.policy, args)
        sizes = weights(policy, run.policy.quantization_config)
        trained = [p for p in unique_parameters(policy).values() if p.requires_grad]
        on(device)["parameters"] = sum(sizes.values())
        on(device)["gradients"] = sum(p.nbytes for p in trained)
        on(device)["optimizer"] = optimizer_bytes(args.optim, trained)
        reference = reference_of(policy, run.policy, args)
        own_pass = not args.on_policy or (args.beta and reference is None)
        passes = [(device, self._scoring(run, policy, "policy"))] if own_pass else []
        if reference is not None:
            where = device_map(args, "ref_device")
            for name, size in _split(weights(reference), where).items():
                on(name)["frozen models"] += size
            passes.append((_first(where), self._scoring(run, reference, args.ref_model_name_or_path)))
        for path in filter(is_reward_model, run.rewards):
            where = mapping(args.reward_model_init_kwargs).get("device_map") or device_map(args, "reward_device")
            model = reward_model_of(path, args)
            for name, size in _split(weights(model), where).items():
                on(name)["frozen models"] += size
            passes.append((_first(where), self._reward(run, model, path)))
        for name, size in passes:  # one after the other
            on(name)["scoring"] = max(on(name)["scoring"], size)
        update = self._update(run, policy) + _dequantized(policy, run)
        gradients = on(device)["gradients"]
        on(device)["activations"] = max(update - gradients, step_bytes(args.optim, trained, args.device.type))
        self._rollout(run, policy, devices[device])
        return Plan(devices, self._assumptions(run, policy))

    def available(self, device: str) -> int:
        """Bytes of a device."""
        if self.memory is not None:
            return self.memory
        return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else virtual_memory().available

    def _once(self, key: Any, run: Run, names: tuple[str, ...], compute: Callable[[], Any]) -> Any:
        """The result of a dry run that depends on the models of `key` and on these arguments."""
        policy, args = run.policy, run.args
        key = key, policy.path, id(policy.peft_config), *(getattr(args, name) for name in (*names, *EVERY_RUN))
        if key not in self._runs:
            self._runs[key] = compute()
        return self._runs[key]

    def _update(self, run: Run, policy: Any) -> int:
        names = ("gradient_checkpointing", *STREAM)
        return self._once(
            "update", run, names, lambda: dry_run.update_bytes(dry_run.FakeModel(policy), run.args, run.prompt_length)
        )

    def _scoring(self, run: Run, model: Any, name: Any) -> int:
        return self._once(
            ("scoring", name),
            run,
            STREAM,
            lambda: dry_run.scoring_bytes(dry_run.FakeModel(model), run.args, run.prompt_length),
        )

    def _reward(self, run: Run, model: Any, path: str) -> int:
        args, config = run.args, model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or run.prompt_length + args.max_completion_length
        length = min(args.reward_max_length or longest, longest, run.prompt_length + args.max_completion_length)
        rows = min(args.reward_batch_size, args.per_device_train_batch_size * args.steps_per_generation)
        return self._once(
            ("reward", path, rows, length),
            run,
            (),
            lambda: dry_run.reward_bytes(dry_run.FakeModel(model), rows, length),
        )

    def _rollout(self, run: Run, policy: Any, device: DevicePlan) -> None:
        args, model = run.args, causal_lm(policy)
        on_device = args.device.type
        copies = args.bf16 or args.fp16
        if copies and on_device in LOW_PRECISION_ON and is_packed(policy):
            linear = [m.weight for m in model.modules() if type(m) is torch.nn.Linear]
            device.items["16-bit copies"] = sum(2 * w.numel() for w in linear if w.dtype == torch.float32)
        prompts = args.per_device_train_batch_size * args.steps_per_generation // args.num_generations
        native = args.rollout_engine == "native" and is_packed(policy)
        group = key_value_bytes(model, run.prompt_length + args.num_generations * args.max_completion_length)
        free = device.available - sum(device.items[name] for name in RESIDENT)
        groups = free // 2 // group if native else prompts
        if args.max_concurrent_rows:
            groups = args.max_concurrent_rows // args.num_generations
        groups = max(1, min(prompts, groups))
        measure = dry_run.rollout_bytes if native else dry_run.generate_bytes
        names = ("rollout_engine", "top_p", "top_k", "min_p")
        cache, work = self._once(
            ("rollout", groups),
            run,
            names,
            lambda: measure(dry_run.FakeModel(policy), args, run.prompt_length, groups),
        )
        kept = native and args.cuda_graphs and on_device == "cuda"
        device.items["kept cache" if kept else "key-value cache"] = cache
        device.items["decoding"] = work

    def _assumptions(self, run: Run, policy: Any) -> list[str]:
        args = run.args
        sharded = args.distributed_state is not None and args.distributed_state.distributed_type in (
            "DEEPSPEED",
            "FSDP",
        )
        said = {
            f"prompts of {ASSUMED_PROMPT} tokens: max_prompt_length is not set": args.max_prompt_length is None,
            f"for optim={args.optim} the memory of AdamW": not is_known(args.optim),
            "a whole policy on each rank, though DeepSpeed or FSDP may shard it": sharded,
            "padded rows: this model cannot be run on streams of groups": not is_packed(policy),
        }
        return [text for text, applies in said.items() if applies]


# Arguments on which the dry runs depend: all, and those on the tokens of a micro-batch
EVERY_RUN = (
    "bf16",
    "fp16",
    "temperature",
    "num_generations",
    "max_prompt_length",
    "max_completion_length",
)
STREAM = (
    "per_device_train_batch_size",
    "steps_per_generation",
    "gradient_accumulation_steps",
    "max_tokens_per_microbatch",
    "entropy_coef",
)


def _split(sizes: dict[str, int], where: DeviceMap | Any) -> dict[str, int]:
    """Bytes by device of tensors that an accelerate device map places; what is on disk is in no memory."""
    if not isinstance(where, dict):
        where = {"": where}
    result: Counter[str] = Counter()
    for name, size in sizes.items():
        prefixes = [p for p in where if not p or name == p or name.startswith(f"{p}.")]
        result[_name(where[max(prefixes, key=len)] if prefixes else next(iter(where.values())))] += size
    return {name: size for name, size in result.items() if name != "disk"}


def _first(where: DeviceMap | Any) -> str:
    devices = [_name(place) for place in where.values()] if isinstance(where, dict) else [_name(where)]
    return next((name for name in devices if name != "disk"), "cpu")


def _name(place: Any) -> str:
    name = f"cuda:{place}" if isinstance(place, int) else str(place)
    return "cuda:0" if name == "cuda" else name


def _dequantized(policy: Any, run: Run) -> int:
    """A quantised weight is unpacked to be used, one at a time."""
    if run.policy.quantization_config is None:
        return 0
    return max((weight.nbytes for weight in quantized(policy).values()), default=0)
