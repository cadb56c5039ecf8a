"""The fields of a config: how they are written, and whether a value has the type of its field. That is read from the
annotations, so a new field needs nothing here."""

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.trainer_pt_utils import AcceleratorConfig

# What fields take beside the types that they are annotated with.
ALSO: dict[str, tuple[type, ...]] = {
    "output_dir": (os.PathLike,),
    "resume_from_checkpoint": (os.PathLike, bool),
    "scale_rewards": (bool,),  # TRL's older values
    "report_to": (tuple,),
    "debug": (NoneType,),
    "model_revision": (NoneType,),
    "lora_alpha": (float,),
    "lora_target_modules": (str,),  # what TRL makes of a list of one
    "accelerator_config": (AcceleratorConfig,),  # what transformers makes of it
}
MAY_BE_INFINITE = ("max_grad_norm",)
LARGEST = 2**63 - 1  # of torch's integers

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}


def about(text: str, default: Any = None) -> Any:
    """A field with its help."""
    return dataclasses.field(default=default, metadata={"help": text})


def type_problems(args: Any, names: Iterable[str]) -> list[str]:
    """One sentence per field of these names whose value has another type, or is a number that is not finite or too
    large for torch. Those are set to their defaults, so that reading goes on."""
    hints, checked, problems = _hints(type(args)), set(names), []
    for field in fields(args):
        value, hint = getattr(args, field.name), hints[field.name]
        if field.name not in checked or value is field.default or isinstance(value, ALSO.get(field.name, ())):
            continue
        if not _fits(value, hint):
            problems.append(f"{field.name}={value!r:.100} ({type(value).__name__}): expected {_expected(hint)}.")
        elif not (field.name in MAY_BE_INFINITE and value == math.inf) and not _is_usable(value):
            problems.append(f"{field.name}={value!r:.100}: expected a finite number of at most 64 bits.")
        else:
            continue
        set_to_default(args, field.name)
    return problems


def set_to_default(args: Any, name: str) -> None:
    """What a field would be if it had not been given."""
    setattr(args, name, default_of(type(args).__dataclass_fields__[name]))


def default_of(field: Field) -> Any:
    """The default of a field, made anew where it is made."""
    return field.default if field.default_factory is MISSING else field.default_factory()


@lru_cache(maxsize=8)
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    options = _options(hint)
    if any(isinstance(option, type) and issubclass(option, Enum) for option in options):
        options = [option for option in options if option is not str]  # the text is the name of a member
    return any(_is(value, option) for option in options)


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, *get_args(hint)) for item in value)
    kind = origin or hint
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if issubclass(kind, Enum):
        return isinstance(value, kind) or (isinstance(value, str) and value in {member.value for member in kind})
    return isinstance(value, kind)


def _is_usable(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_usable, value))
    if isinstance(value, int):  # of any length: as a float it might overflow
        return -LARGEST <= value <= LARGEST
    return not isinstance(value, Real) or abs(float(value)) <= LARGEST  # NaN compares False


def _options(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def _expected(hint: Any) -> str:
    options = _options(hint)
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            values = [member.value for member in option]
            return f"one of {', '.join(values)}{' (in YAML no needs quotes)' if 'no' in values else ''}"
    return " or ".join(dict.fromkeys(map(_word, options)))


def _word(hint: Any) -> str:
    if hint is NoneType:
        return "nothing (None)"
    if get_origin(hint) is list:
        return f"a list ({_expected(*get_args(hint))} each)"
    kind = get_origin(hint) or hint
    return str(get_args(hint)[0]) if kind is Literal else _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
