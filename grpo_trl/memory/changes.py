"""Single changes of a recipe that save memory, ranked by how much."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig

from ..config_checks import combination_problems
from ..placement import is_zero3
from ..policy import holds_adapter
from ..trainer_checks import reference_problems, zero3_problems
from .plan import Plan, Run, plan_run


@dataclass(frozen=True)
class Advice:
    """A change, in the words of a recipe, and the plan with it."""

    change: str
    plan: Plan


def ranked_changes(run: Run, plan: Plan, memory: int | None = None) -> list[Advice]:
    """The changes with which the fullest device is less full than in `plan`, the best first.

    `memory`: as for `plan_run`.
    """
    suggested = [suggestion for suggest in CHANGES if (suggestion := suggest(run)) is not None]
    possible = [(change, changed) for change, changed in suggested if not _refused(run, changed)]
    advice = [Advice(change, planned) for change, changed in possible if (planned := _planned(changed, memory))]
    helpful = [each for each in advice if each.plan.fullest.strain < plan.fullest.strain]
    return sorted(helpful, key=lambda each: each.plan.fullest.strain)


def _planned(run: Run, memory: int | None) -> Plan | None:
    """None where the change is not possible with this model, an adapter say."""
    try:
        return plan_run(run, memory)
    except ValueError:
        return None


def _refused(run: Run, changed: Run) -> bool:
    """Whether the change leads to a run that a trainer would not begin."""
    return bool(_problems(changed) - _problems(run))


def _problems(run: Run) -> set[str]:
    args, policy = run.args, run.policy
    placed = zero3_problems(args.ref_device) if is_zero3(args.deepspeed_plugin) else []
    return {
        *combination_problems(args),
        *placed,
        *reference_problems(policy.path, args, policy.peft_config is not None or holds_adapter(policy.path)),
    }


Suggestion = tuple[str, Run] | None


def _checkpointing(run: Run) -> Suggestion:
    return None if run.args.gradient_checkpointing else _set(run, "gradient_checkpointing", True)


def _smaller_pieces(run: Run) -> Suggestion:
    """Half of a micro-batch at a time, but not less than one completion."""
    args = run.args
    whole = args.per_device_train_batch_size * args.max_completion_length
    whole += -(-args.per_device_train_batch_size // args.num_generations) * run.prompt_length
    now = min(args.max_tokens_per_microbatch or whole, whole)
    half = max(now // 2, run.prompt_length + args.max_completion_length)
    return _set(run, "max_tokens_per_microbatch", half) if half < now else None


def _fewer_rows(run: Run) -> Suggestion:
    """Half of the completions at a time, but not less than one group."""
    args = run.args
    most = args.completions_per_rank
    now = min(args.max_concurrent_rows or most, most)
    half = max(now // 2, args.num_generations)
    return _set(run, "max_concurrent_rows", half) if half < now else None


def _lora(run: Run) -> Suggestion:
    if run.policy.peft_config is not None:
        return None
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    text = "use_peft: true, lora_r: 16, lora_target_modules: all-linear, lora_dropout: 0 (no other lora_* option)"
    return text, replace(run, policy=replace(run.policy, peft_config=adapter))


def _on_cpu(name: str) -> Callable[[Run], Suggestion]:
    return lambda run: _set(run, name, "cpu") if run.args.device.type != "cpu" else None


CHANGES: tuple[Callable[[Run], Suggestion], ...] = (
    _checkpointing,
    _smaller_pieces,
    _fewer_rows,
    _lora,
    _on_cpu("ref_device"),
    _on_cpu("reward_device"),
)


def _set(run: Run, name: str, value: Any) -> tuple[str, Run]:
    """One field of the arguments, as a recipe would have it."""
    args = copy.copy(run.args)
    setattr(args, name, value)
    return f"{name}: {str(value).lower()}", replace(run, args=args)
