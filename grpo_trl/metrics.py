"""Metrics leave the step as (sum, count) tensors and are reduced over ranks once, at log time."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .algorithm import informative_groups
from .batch import Group

Value = Tensor | float | int
OF_TRANSFORMERS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "num_tokens",
)  # beside which metrics are logged


class Metrics:
    """Accumulates means, minima and maxima between two logs, without a host synchronisation in the step.

    A mean is weighted by its counts over everything added and all ranks (a token-mean stays a token-mean), and so is a
    standard deviation. Values stay on their device until they are reduced.
    """

    def __init__(self):
        self._sums: dict[str, list[tuple[Value, ...]]] = {}  # (sum, count), with the sum of squares for a deviation
        self._extremes: dict[str, list[Value]] = {}  # minima by `_is_min`, else maxima
        self._of_rewards: set[str] = set()  # names that reward functions chose

    def add(self, name: str, total: Value, count: Value = 1) -> None:
        """Adds to a mean. Nothing is counted when `count` is 0."""
        self._rows(name).append((total, count))

    def add_number(self, name: str, value: Any) -> None:
        """Adds what a reward function logs to a mean; NaN is left out, as in TRL. Raises TypeError for what is no
        number, ValueError for a name that the trainer logs under (here, or when it next does)."""
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"log_metric({name!r}, {value!r}): expected one number.") from error
        self._of_rewards.add(name)
        if name in OF_TRANSFORMERS:
            self.refuse(name)
        if not math.isnan(number):
            self._sums.setdefault(name, []).append((number, 1))

    def add_all(self, values: Mapping[str, tuple[Value, Value] | Tensor]) -> None:
        """Adds several: (sum, count) pairs to means, tensors to extremes."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.add_extreme(name, value)
            else:
                self.add(name, *value)

    def add_mean(self, name: str, values: Tensor) -> None:
        """Adds each finite value with weight 1; NaN means "not applicable"."""
        valid = values.isfinite()
        self.add(name, torch.where(valid, values, 0).sum(), valid.sum())

    def add_std(self, name: str, values: Tensor) -> None:
        """Adds each finite value to a sample standard deviation (n - 1)."""
        valid = values.isfinite()
        values = torch.where(valid, values, 0).double()
        self._rows(name).append((values.sum(), valid.sum(), values.square().sum()))

    def add_extreme(self, name: str, values: Tensor) -> None:
        """Adds to a minimum (`min` in the last part of the name) or a maximum; infinite values do not count."""
        if name in self._of_rewards:
            self.refuse(name)
        if values.numel():
            self._extremes.setdefault(name, []).append(values.min() if _is_min(name) else values.max())

    def _rows(self, name: str) -> list[tuple[Value, ...]]:
        if name in self._of_rewards:
            self.refuse(name)
        return self._sums.setdefault(name, [])

    def refuse(self, name: str) -> NoReturn:
        """Of a name that the trainer uses itself."""
        raise ValueError(f"log_metric({name!r}, ...): the trainer logs a metric of this name; call yours otherwise.")

    def reduce(self, gather_object: Callable[[list], list]) -> dict[str, float]:
        """Means and extremes over everything added on every rank since the last call, then empties itself.

        `gather_object` concatenates lists of picklable objects over ranks; it is called once. A mean without a single
        count is left out.
        """
        local = [self.state_dict()]
        self._sums, self._extremes = {}, {}
        parts = gather_object(local)
        names = dict.fromkeys(name for part in parts for name in (*part["sums"], *part["extremes"]))
        result: dict[str, float] = {}
        for name in names:
            if any(name in part["extremes"] for part in parts):
                values = [part["extremes"][name] for part in parts if name in part["extremes"]]
                result[name] = min(values) if _is_min(name) else max(values)
                continue
            pairs = [part["sums"][name] for part in parts if name in part["sums"]]
            total, count, *squares = (sum(column) for column in zip(*pairs, strict=True))
            if squares and count:
                result[name] = math.sqrt(max(0.0, squares[0] - total**2 / count) / max(1.0, count - 1))
            elif count:
                result[name] = total / count
        return result

    def copy(self) -> "Metrics":
        """What was added so far, as an accumulator of its own."""
        other = Metrics()
        other._sums = {name: list(rows) for name, rows in self._sums.items()}
        other._extremes = {name: list(values) for name, values in self._extremes.items()}
        return other

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: part of a checkpoint, so that a resumed run logs what an uninterrupted one would."""
        sums = {name: _total(pairs) for name, pairs in self._sums.items()}
        pick = {name: min if _is_min(name) else max for name in self._extremes}
        finite = {name: [*filter(math.isfinite, map(float, values))] for name, values in self._extremes.items()}
        return {"sums": sums, "extremes": {name: pick[name](values) for name, values in finite.items() if values}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._sums = {name: [tuple(pair)] for name, pair in state["sums"].items()}
        self._extremes = {name: [value] for name, value in state["extremes"].items()}


def _is_min(name: str) -> bool:
    return "min" in name.rsplit("/", 1)[-1].split("_")


def _total(rows: list[tuple[Value, ...]]) -> tuple[float, ...]:
    """Without what is not finite, as in TRL: of an update that was skipped for it, or the log would have a hole."""
    numbers = [tuple(map(float, row)) for row in rows]
    finite = [row for row in numbers if all(map(math.isfinite, row))]
    return tuple(map(sum, zip(*finite, strict=True))) if finite else (0.0,) * len(rows[0])


def record_rollout(
    metrics: Metrics,
    groups: Sequence[Group],
    rewards_per_func: Tensor,
    rewards: Tensor,
    compared: Tensor,
    reward_names: Sequence[str],
) -> None:
    """Lengths, truncation and rewards of a rollout, under TRL's names. rewards_per_func (B, F); their sum, and what is
    compared of them within groups, (B,)."""
    lengths = torch.tensor([len(ids) for group in groups for ids in group.completion_ids]).double()
    terminated = torch.tensor([flag for group in groups for flag in group.terminated])
    for kind, values in (("", lengths), ("terminated_", lengths[terminated])):
        metrics.add_mean(f"completions/mean_{kind}length", values)
        metrics.add_extreme(f"completions/min_{kind}length", values)
        metrics.add_extreme(f"completions/max_{kind}length", values)
    metrics.add_mean("completions/clipped_ratio", (~terminated).double())
    # as fp32, whose sums in fp64 are exact: the same in any order, in a replay say
    for name, values in zip(reward_names, rewards_per_func.float().T, strict=True):
        metrics.add_mean(f"rewards/{name}/mean", values)
        metrics.add_std(f"rewards/{name}/std", values)
    metrics.add_mean("reward", rewards)
    metrics.add_std("reward_std", rewards)
    metrics.add_mean("frac_reward_zero_std", (~informative_groups(compared, len(groups[0]))).double())


def completion_rows(
    groups: Sequence[Group],
    rewards_per_func: Tensor,
    advantages: Sequence[float | None],
    reward_names: Sequence[str],
    extra: Mapping[str, Sequence[Any]],
) -> list[dict[str, Any]]:
    """One row per completion for tables: prompt, completion, rewards, advantage (None in an evaluation), and columns
    that rewards added."""
    for column, values in extra.items():
        if len(values) != len(rewards_per_func):
            raise ValueError(
                f"log_extra({column!r}, ...) was given {len(values)} values for {len(rewards_per_func)} completions; "
                "give one per completion."
            )
    names = Counter(["step", "prompt", "completion", "advantage", *reward_names, *extra])
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"The table of completions would have two columns {', '.join(twice)}; call the reward, or the column of "
            "log_extra, otherwise."
        )
    texts = [(group.prompt.example["prompt"], completion) for group in groups for completion in group.completions]
    return [
        {
            "prompt": prompt,
            "completion": completion,
            **dict(zip(reward_names, row_rewards, strict=True)),
            "advantage": advantage,
            **{column: values[i] for column, values in extra.items()},
        }
        for i, ((prompt, completion), row_rewards, advantage) in enumerate(
            zip(texts, rewards_per_func.tolist(), advantages, strict=True)
        )
    ]
