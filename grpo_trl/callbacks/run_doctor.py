"""The run doctor: reads the logged metrics and says in plain sentences what is wrong with a run and what to do.

A rule is a row of `RULES`: a pure function of the logs so far, a sentence and a remedy. docs/diagnosis.md lists them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, nan
from statistics import fmean
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

# What a rule about rewards, lengths or gradients looks at: so many logs and completions at the least
MIN_LOGS = 2
MIN_COMPLETIONS = 64

ALWAYS_CLIPPED_LOGS = 10
DEAD_SHARE = 0.8  # of the groups without gradient: then four fifths of the sampling are wasted
DROWNED_BY = 20.0  # how many times the spread of all other rewards together
CUT = 0.05  # of the rows of a reward model
RATIO_GAP = 0.01  # nats per token; rounding in bf16 stays below, dropout of 0.1 is ten times as much
SETTLED = 0.1  # of its mean: a reward in [0, 1] that varies by less, as a format that is nearly learned, is no concern
PENALTIES, RARE = ("soft_overlong",), 0.05  # whose 0 is what is wanted; and about 0
CORRECTED_GAP = 0.5  # what `sampler_correction` cannot be meant for
SAMPLER_GAP = 0.05  # nats per token; bf16 stays below, a wrong position or mask is of order 1
KL_LIMIT = 1.0  # nats per token
ENTROPY_LIMIT = 0.1  # nats per token, and a fifth of what it was
COLLAPSE = 0.2

Found = dict[str, Any]  # what a sentence is filled in with; {"reward": name} tells causes of one rule apart


@dataclass(frozen=True)
class Course:
    """A run so far, as rules see it.

    Args:
        logs: `TrainerState.log_history`, oldest first; those with a `loss` are of training.
        args: the `GRPOConfig`.
        reward_weights: name -> weight of each reward.
    """

    logs: Sequence[Mapping[str, Any]]
    args: Any
    reward_weights: Mapping[str, float]

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever training logged this metric, and it was finite."""
        return [(row["step"], row[key]) for row in self.logs if "loss" in row and isfinite(row.get(key, nan))]

    def recent(self, key: str) -> list[float]:
        """The latest values, of at least `MIN_COMPLETIONS` completions; [] as long as there are too few."""
        points = self.points(key)
        if len(points) < MIN_LOGS or points[-1][0] < self._steps:
            return []
        late = [value for step, value in points if step > points[-1][0] - self._steps]
        return max(late, [value for _, value in points[-MIN_LOGS:]], key=len)

    def first(self, key: str) -> list[float]:
        """As many values as `recent` has, of the beginning; [] as long as the two overlap."""
        points, count = self.points(key), len(self.recent(key))
        return [value for _, value in points[:count]] if len(points) >= 2 * count else []

    @property
    def _steps(self) -> int:
        """Optimizer steps in which `MIN_COMPLETIONS` are sampled."""
        return ceil(MIN_COMPLETIONS / self.args.generation_batch_size) * self.args.optimizer_steps_per_rollout


@dataclass(frozen=True)
class Rule:
    """What may be wrong: `finds` it in a course, the sentence says it (filled in with what was found), the remedy
    says what to do."""

    name: str
    finds: Callable[[Course], list[Found]]
    sentence: str
    remedy: str


class RunDoctorCallback(TrainerCallback):
    """Logs each diagnosis once, as a warning, on the main process."""

    def __init__(self, reward_weights: Mapping[str, float]):
        self.reward_weights = dict(reward_weights)
        self._said: set[tuple[str, str | None]] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        for cause, text in diagnose(Course(state.log_history, args, self.reward_weights)).items():
            if cause not in self._said:
                self._said.add(cause)
                logger.warning("Run doctor, step %d (%s): %s", state.global_step, cause[0], text)


def diagnose(course: Course) -> dict[tuple[str, str | None], str]:
    """What is wrong with a run at its last log: (name of the rule, name of the reward or None) -> sentence and
    remedy."""
    return {
        (rule.name, found.get("reward")): f"{rule.sentence.format(**found)} {rule.remedy}"
        for rule in RULES
        for found in rule.finds(course)
    }


# ---- Conditions ----


def _eos_never(course: Course) -> list[Found]:
    shares = [value for _, value in course.points("completions/clipped_ratio")]
    return [{"limit": course.args.max_completion_length}] if _never_ended(course) and set(shares) == {1.0} else []


def _all_truncated(course: Course) -> list[Found]:
    shares = [value for _, value in course.points("completions/clipped_ratio")]
    return [{"limit": course.args.max_completion_length}] if _never_ended(course) and min(shares) < 1 else []


def _length_grows(course: Course) -> list[Found]:
    then, now = _ends(course, "completions/clipped_ratio")
    before, after = _ends(course, "completions/mean_length")
    if not (before and then < 0.25 and now >= 0.5 and after > 1.5 * before):
        return []
    return [{"before": before, "after": after, "share": now, "limit": course.args.max_completion_length}]


def _length_shrinks(course: Course) -> list[Found]:
    before, after = _ends(course, "completions/mean_length")
    return [{"before": before, "after": after}] if after < COLLAPSE * before else []


def _dead_groups(course: Course) -> list[Found]:
    shares, rewards = course.recent("frac_reward_zero_std"), course.recent("reward")
    applied = bool(rewards)  # else no function gave a reward to anything, which the scorer says
    if not shares or fmean(shares) < DEAD_SHARE or not applied or _no_reward_varies(course):
        return []
    return [{"share": fmean(shares), "reward_mean": fmean(rewards)}]


def _constant_reward(course: Course) -> list[Found]:
    names = [name for name in _constant(course) if course.reward_weights[name] and not _is_silent(course, name)]
    return [{"reward": name, "value": fmean(_means(course, name))} for name in names]


def _drowned_rewards(course: Course) -> list[Found]:
    if course.args.multi_objective_aggregation != "sum_then_normalize":
        return []  # each reward is brought to the same spread before it is added
    spreads = {
        name: abs(weight) * fmean(_stds(course, name))
        for name, weight in course.reward_weights.items()
        if _stds(course, name) and name not in _constant(course)
    }
    largest = max(spreads, key=lambda name: spreads[name], default="")
    others = sum(
        spread
        for name, spread in spreads.items()
        if name != largest and not _is_silent(course, name) and not _is_settled(course, name)
    )
    if not others or spreads[largest] < DROWNED_BY * others:
        return []
    return [{"reward": largest, "spread": spreads[largest], "others": others}]


def _cut_for_the_reward(course: Course) -> list[Found]:
    shares = {name: course.recent(f"rewards/{name}/truncated") for name in course.reward_weights}
    return [
        {"reward": name, "share": fmean(values)} for name, values in shares.items() if values and fmean(values) > CUT
    ]


def _ratio_is_not_one(course: Course) -> list[Found]:
    return _gap_above(RATIO_GAP, course, "importance_ratio/first_step_gap")


def _sampler_disagrees(course: Course) -> list[Found]:
    args = course.args
    truncates = args.top_k or args.top_p < 1 or args.min_p or args.repetition_penalty != 1 or args.generation_kwargs
    if args.sampler_correction and truncates:
        return []  # as is to be expected
    limit = CORRECTED_GAP if args.sampler_correction else SAMPLER_GAP
    return _gap_above(limit, course, "sampling/logp_gap")


def _gap_above(limit: float, course: Course, name: str) -> list[Found]:
    """To log-probabilities of when a batch was made; those of groups that were carried over, or are
    replayed, are older."""
    gaps, carried = course.points(name), course.points("dynamic_sampling/carried")
    older = course.args.replay_rollouts is not None or (carried and carried[-1][1] > 0)
    return [{"gap": gaps[-1][1]}] if gaps and gaps[-1][1] > limit and not older else []


def _kl_runs_away(course: Course) -> list[Found]:
    kl = course.recent("kl")
    return [{"kl": fmean(kl), "beta": course.args.beta}] if kl and fmean(kl) > KL_LIMIT else []


def _entropy_collapses(course: Course) -> list[Found]:
    before, after = _ends(course, "entropy")
    return [{"before": before, "after": after}] if after < min(ENTROPY_LIMIT, COLLAPSE * before) else []


def _no_gradient(course: Course) -> list[Found]:
    norms, dead = course.recent("grad_norm"), course.recent("frac_reward_zero_std")
    if not dead:
        return []  # not known yet whether rewards differ: of a rollout there is one log, of updates there are more
    masked = course.args.mask_truncated_completions and _never_ended(course)
    explained = masked or _no_reward_varies(course) or min(dead) == 1  # which other rules say
    return [{"count": len(norms)}] if norms and max(norms) == 0 and not explained else []


def _always_clipped(course: Course) -> list[Found]:
    limit = course.args.max_grad_norm
    norms = [value for _, value in course.points("grad_norm")[-ALWAYS_CLIPPED_LOGS:]]
    if not limit or len(norms) < ALWAYS_CLIPPED_LOGS or min(norms) <= limit:
        return []
    return [{"count": len(norms), "mean": fmean(norms), "limit": limit}]


def _learning_rate_is_zero(course: Course) -> list[Found]:
    rates = [value for _, value in course.points("learning_rate")[-MIN_LOGS:]]  # the first of a warmup may be 0
    return [{"count": len(rates)}] if len(rates) == MIN_LOGS and max(rates) == 0 else []


def _never_ended(course: Course) -> bool:
    shares = course.recent("completions/clipped_ratio")
    return bool(shares) and min(shares) == 1


def _ends(course: Course, key: str) -> tuple[float, float]:
    """Means of the beginning and of late; 0 and 0 as long as they overlap."""
    first = course.first(key)
    return (fmean(first), fmean(course.recent(key))) if first else (0.0, 0.0)


def _means(course: Course, reward: str) -> list[float]:
    return course.recent(f"rewards/{reward}/mean")


def _stds(course: Course, reward: str) -> list[float]:
    return course.recent(f"rewards/{reward}/std")


def _constant(course: Course) -> list[str]:
    """Rewards that gave the same value to all recent completions, but for the rounding of a mean."""
    found = []
    for name in course.reward_weights:
        means, stds = _means(course, name), _stds(course, name)
        size = 1e-6 * max((abs(mean) for mean in means), default=0.0)
        if means and stds and max(stds) <= size and max(means) - min(means) <= size:
            found.append(name)
    return found


def _is_silent(course: Course, name: str) -> bool:
    """A penalty beside other rewards that hardly anything has called for."""
    return name in PENALTIES and len(course.reward_weights) > 1 and abs(fmean(_means(course, name))) < RARE


def _is_settled(course: Course, name: str) -> bool:
    mean = fmean(_means(course, name))
    return 0 <= mean <= 1 and fmean(_stds(course, name)) <= SETTLED * mean


def _no_reward_varies(course: Course) -> bool:
    counted = {name for name, weight in course.reward_weights.items() if weight}
    return counted <= set(_constant(course))


# ---- Rules ----

RULES = (
    Rule(
        "EOS never appears",
        _eos_never,
        "Not one completion has ended with an EOS token since the run began: all were cut at max_completion_length="
        "{limit}.",
        "Read some (log_completions: true). If they say all they have to say and go on, the token that ends a turn is "
        "not among the model's EOS ids, or a base model was never taught to end: `grpo-trl check` shows which tokens "
        "end a completion; set eos_token_id in generation_config.json. If they are cut in mid-sentence, raise "
        "max_completion_length.",
    ),
    Rule(
        "all truncated",
        _all_truncated,
        "All recent completions were cut at max_completion_length={limit}, where some ended before.",
        "Their rewards are those of unfinished answers, and nothing teaches the policy to end: raise "
        "max_completion_length, or set overlong_penalty: true; mask_truncated_completions: true would leave all of "
        "them out of the loss. If they repeat themselves, go back to a checkpoint and lower learning_rate.",
    ),
    Rule(
        "length runs away",
        _length_grows,
        "Completions grew from {before:.0f} to {after:.0f} tokens on average, and {share:.0%} are now cut at "
        "max_completion_length={limit}.",
        "If the reward rises with them, raise max_completion_length; if not, the policy rambles: set "
        "overlong_penalty: true, or token_weighting: max_length (variant dr_grpo), which does not reward length.",
    ),
    Rule(
        "length collapses",
        _length_shrinks,
        "Completions shrank from {before:.0f} to {after:.0f} tokens on average.",
        "A reward is easier to get by saying little: read completions (log_completions: true), and look for one that "
        "punishes length or pays without an answer; raise beta or lower learning_rate.",
    ),
    Rule(
        "dead groups",
        _dead_groups,
        "In {share:.0%} of the recent groups all completions had the same reward, so they have no gradient (mean "
        "reward {reward_mean:.3g}).",
        "If the prompts are too hard (reward near its minimum), use easier ones, more num_generations or a reward "
        "with partial credit; if too easy, use harder ones. dynamic_sampling: true, where it is not on, draws until a "
        "batch is full of groups with a gradient; skip_solved_after and skip_hopeless_after pass over prompts that "
        "stay as they are.",
    ),
    Rule(
        "constant reward",
        _constant_reward,
        "Reward {reward!r} was {value:.4g} for all recent completions, so it teaches nothing.",
        "Unless that is its maximum, it probably does not read what the policy writes (format, answer column, "
        "truncation): `grpo-trl check` shows it on real completions. Otherwise the task is beyond the policy: easier "
        "prompts, a warm start, or partial credit.",
    ),
    Rule(
        "drowned rewards",
        _drowned_rewards,
        "Reward {reward!r} drowns the others: its spread times its weight is {spread:.3g}, that of all others "
        "together {others:.3g}.",
        "Change reward_weights, or set multi_objective_aggregation: normalize_then_sum, which brings each reward to "
        "the same spread first.",
    ),
    Rule(
        "reward reads a part",
        _cut_for_the_reward,
        "Reward model {reward!r} read {share:.0%} of the recent rows without their beginning: prompt and completion "
        "are longer than what it takes.",
        "Lower max_prompt_length and max_completion_length, so that both fit; or raise reward_max_length, if the "
        "model was made for longer texts.",
    ),
    Rule(
        "ratio is not 1",
        _ratio_is_not_one,
        "On the first step after a rollout the policy is still the one that sampled, yet its log-probabilities differ "
        "from the old ones by {gap:.2g} nats per token.",
        "Something is random or different in the update: set disable_dropout: true, take noise (NEFTune) and layers "
        "that depend on train mode out, and compare with bf16: false. `grpo-trl check` measures it.",
    ),
    Rule(
        "sampler disagrees",
        _sampler_disagrees,
        "The log-probabilities of sampling differ from those of the update by {gap:.2g} nats per token.",
        "What is trained is not what sampled: set top_p: 1, top_k: 0, min_p: null and repetition_penalty: 1; try "
        "rollout_engine: hf_generate, and bf16: false. Where the gap is the sampler's precision, sampler_correction: "
        "token_truncate corrects for it.",
    ),
    Rule(
        "KL runs away",
        _kl_runs_away,
        "The KL to the reference is {kl:.2g} nats per token (beta={beta:g}): the policy has left it.",
        "Lower learning_rate or num_iterations, or raise beta; go back to a checkpoint from before the rise if the "
        "completions have become nonsense.",
    ),
    Rule(
        "entropy collapses",
        _entropy_collapses,
        "The entropy fell from {before:.2g} to {after:.2g} nats per token: completions of a group are nearly the "
        "same.",
        "Raise epsilon_high (clip-higher: 0.28), set entropy_coef: 0.001, raise beta, or lower learning_rate.",
    ),
    Rule(
        "no gradient",
        _no_gradient,
        "grad_norm was exactly 0 in the last {count} logs, though rewards differ within groups.",
        "Nothing is trained: check that the trained parameters take part in the forward pass (an adapter that is "
        "active, requires_grad), and that no loss mask, clip range or policy mask leaves every token out.",
    ),
    Rule(
        "always clipped",
        _always_clipped,
        "grad_norm was above max_grad_norm={limit:g} in the last {count} logs ({mean:.3g} on average), so every "
        "update is scaled down.",
        "If rewards do not rise, lower learning_rate and look for exploding ratios or KL; if all is well, raise "
        "max_grad_norm, so that it acts on outliers only.",
    ),
    Rule(
        "learning rate is 0",
        _learning_rate_is_zero,
        "The learning rate was 0 in the last {count} logs: the policy does not move.",
        "Check learning_rate, warmup and lr_scheduler_type; a schedule made for fewer steps has run out.",
    ),
)
