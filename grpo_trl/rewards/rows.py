"""What a reward function is given and gives back: one value per completion, in the order of the groups."""

import copy
import math
import numbers
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from decimal import Decimal
from typing import Any, cast

import torch
from torch import Tensor

from ..batch import Group
from .isolation import in_words

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # as in TRL: passed under other names, or the sampled ids
RESERVED = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


def rows_of(groups: Sequence[Group]) -> dict[str, list]:
    """What is given per completion: prompts, completions, completion_ids and every column, each a list of B values.

    Lists and dicts are copies, one per row: a function that changes one changes neither what is trained nor what other
    rows and functions see.
    """
    for group in groups:
        if len(group.completions) != len(group):
            raise ValueError(
                f"A group of {len(group)} sampled completions has {len(group.completions)} texts; fill "
                "Group.completions (text, or messages) before scoring."
            )
    examples = [group.prompt.example for group in groups for _ in range(len(group))]
    columns = dict.fromkeys(key for group in groups for key in group.prompt.example if key not in NOT_COLUMNS)
    if clashes := [key for key in columns if key in RESERVED]:
        raise ValueError(f"Dataset columns {clashes} clash with arguments of reward functions; rename or remove them.")
    return {
        "prompts": [_own(example["prompt"]) for example in examples],
        "completions": [_own(completion) for group in groups for completion in group.completions],
        "completion_ids": [list(ids) for group in groups for ids in group.completion_ids],
        **{key: [_own(example.get(key)) for example in examples] for key in columns},
    }


def _own(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, (list, dict)) else value


def one_by_one(rows: dict[str, list]) -> list[dict[str, list]]:
    """The same for each completion alone."""
    return [{key: [values[row]] for key, values in rows.items()} for row in range(len(rows["completions"]))]


def to_rewards(output: Any, count: int, name: str) -> Tensor:
    """A function's output -> (count,) fp64, None as NaN.

    Raises:
        ValueError: a wrong count, NaN, infinity or a non-number; names function, row and value.
    """
    # a set has no order (and holds equal rewards once), so its values belong to no row
    is_scalar = getattr(output, "ndim", None) == 0  # of torch or numpy, which call themselves iterable
    if is_scalar or not isinstance(output, Iterable) or isinstance(output, (str, bytes, Mapping, Set)):
        raise ValueError(
            f"Reward function {name!r} returned {output!r:.100} ({type(output).__name__}); expected a list of {count} "
            "rewards, one per completion (numbers, or None where it does not apply)."
        )
    values = list(output)
    if len(values) != count:
        raise ValueError(
            f"Reward function {name!r} returned {len(values)} rewards, but {count} were expected: one per completion."
        )
    return torch.tensor([_to_float(value, row, name) for row, value in enumerate(values)], dtype=torch.float64)


def _to_float(value: Any, row: int, name: str) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:  # of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Real | Decimal):
        problem = f"({type(value).__name__}) for row {row}; expected a number"
    elif not abs(cast(float, value)) <= torch.finfo(torch.float32).max:  # NaN compares False
        problem = f"for row {row}; expected a finite number within fp32"
    else:
        return float(value)
    raise ValueError(f"Reward function {name!r} returned {value!r:.100} {problem}, or None where it does not apply.")


def describe_failure(found: tuple[int, Exception] | None, name: str, rows: dict[str, list], error: Exception) -> str:
    """Of a function that raised `error` on all rows, and the first row that fails alone, with its error."""
    if found is None:
        return (
            f"Reward function {name!r} failed on all rows together and then, tried again, on none of them alone (a "
            f"fault that has passed, or one of many rows): {in_words(error)}"
        )
    row, row_error = found
    return f"Reward function {name!r} failed on row {row}: {in_words(row_error)}. {_shown(rows, row)}"


def describe_timeout(error: TimeoutError, rows: dict[str, list]) -> str:
    """Which rows a call that took too long had."""
    return f"{error} It was given {len(rows['completions'])} rows, the first of them: {_shown(rows, 0)}"


def _shown(rows: dict[str, list], row: int) -> str:
    return f"Prompt: {reprlib.repr(rows['prompts'][row])}; completion: {reprlib.repr(rows['completions'][row])}"
