"""`train_datasets` entries -> one dataset with a `prompt` column, checked row by row before any model is loaded."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, cast

from datasets import Dataset, Json, LargeList, List, Value, concatenate_datasets, interleave_datasets

from .data_forms import LOADERS, DatasetEntry, json_texts, place
from .prompts import column_batches, prompt_problem, row_problems

logger = logging.getLogger(__name__)


def load_datasets(entries: Sequence[Mapping[str, Any]], *, seed: int = 42) -> Dataset:
    """The rows of all entries, checked, with `prompt`, `answer`, `solution` and every column of their own.

    `prompt` is the entry's input column; `answer` and `solution` are both its output column, if it names one. Input
    and output stay under their own names too. Another column that has one of these three names is kept as
    `original_<name>`; columns that an entry lacks are None in its rows, and columns whose types differ between entries
    keep each value's own type.
    Without weights, entries follow each other. With weights (on all entries or on none), rows are drawn from them in
    these proportions, by `seed`, until each row has been drawn: nothing is lost, rows of small entries repeat.
    Raises ValueError naming file, row and column, and FileNotFoundError naming the resolved path.
    """
    parsed = parse_entries(entries)
    datasets = _align([_load_entry(entry) for entry in parsed])
    if len(datasets) == 1:
        return datasets[0]
    if parsed[0].weight is None:
        return concatenate_datasets(datasets)
    weights = [float(entry.weight or 0) for entry in parsed]
    shares = [weight / sum(weights) for weight in weights]
    mixed = interleave_datasets(datasets, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    parts = ", ".join(f"{e.path}: {len(d)} rows at {s:.1%}" for e, d, s in zip(parsed, datasets, shares, strict=True))
    logger.warning("Mixed by weight to %d rows; rows of small entries repeat (%s).", len(mixed), parts)
    return mixed


def parse_entries(entries: Sequence[Mapping[str, Any]], where: str = "train_datasets") -> list[DatasetEntry]:
    """Checks all entries without reading data; one ValueError lists everything that is wrong with them, and `where`
    they stand."""
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence) or not entries:
        raise ValueError(f"{where} must be a list of entries {{path, type, input, output}}, got {entries!r}.")
    # a key without a value in a YAML file is None: the same as leaving it out
    given = [
        {k: v for k, v in entry.items() if v is not None} if isinstance(entry, Mapping) else entry for entry in entries
    ]
    problems = [f"entry {i}: {problem}" for i, entry in enumerate(given, 1) for problem in _entry_problems(entry)]
    weighted = ["weight" in entry for entry in given if isinstance(entry, Mapping)]
    if any(weighted) and not all(weighted):
        without = [str(i) for i, has_weight in enumerate(weighted, 1) if not has_weight]
        problems.append(f"entries without weight: {', '.join(without)}; give all entries a weight, or none")
    if problems:
        raise ValueError(f"{where}:\n  - " + "\n  - ".join(problems))
    return [DatasetEntry(**entry) for entry in given]


def _entry_problems(entry: Any) -> list[str]:
    if not isinstance(entry, Mapping):
        return [f"got {entry!r}, expected {{path, type, input, output}}"]
    known = {field.name: field.default is MISSING for field in fields(DatasetEntry)}
    problems = [f"unknown key {key!r}; known: {', '.join(known)}" for key in entry if key not in known]
    problems += [f"{key!r} is missing" for key, required in known.items() if required and key not in entry]
    problems += [
        f"{key} must be text, got {value!r}"
        for key, value in entry.items()
        if key in known and key != "weight" and not (isinstance(value, str) and value)
    ]
    kind = entry.get("type")
    if isinstance(kind, str) and kind not in LOADERS:
        problems.append(f"unknown type {kind!r}; use one of {', '.join(LOADERS)}")
    if "name" in entry and kind in LOADERS and kind != "hub":
        problems.append(f"name is the configuration of a Hub dataset; remove it from type {kind}")
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        problems.append(f"weight must be a number above 0, got {weight!r}")
    return problems


def _load_entry(entry: DatasetEntry) -> Dataset:
    dataset = LOADERS[entry.type](entry)
    if len(dataset) == 0:
        raise ValueError(f"{entry.path}: no rows in split {entry.split!r}.")
    for column in filter(None, (entry.input, entry.output)):
        if column not in dataset.column_names:
            raise ValueError(f"{entry.path}: no column {column!r}; its columns are {', '.join(dataset.column_names)}.")
    _check_rows(dataset, entry, entry.input, prompt_problem)
    if entry.output:
        _check_rows(dataset, entry, entry.output, _answer_problem)
    return _with_aliases(dataset, entry)


def _answer_problem(value: Any) -> str | None:
    return "missing or null; fill it in, drop the row, or leave out `output`" if value is None else None


def _check_rows(dataset: Dataset, entry: DatasetEntry, column: str, problem_of: Callable[[Any], str | None]) -> None:
    problems = row_problems(column_batches(dataset, column), problem_of)
    if problems:
        row, problem = problems[0]
        more = f" ({len(problems) - 1} more rows like it)" if len(problems) > 1 else ""
        raise ValueError(f"{place(entry, row)}, column {column!r}: {problem}{more}.")


def _with_aliases(dataset: Dataset, entry: DatasetEntry) -> Dataset:
    sources = {"prompt": entry.input, "answer": entry.output, "solution": entry.output}
    sources = {alias: column for alias, column in sources.items() if column and column != alias}
    # made before any renaming, which may concern the input or output column itself
    aliases = [dataset.select_columns([column]).rename_column(column, alias) for alias, column in sources.items()]
    for alias, column in sources.items():
        if alias in dataset.column_names:
            kept = f"original_{alias}"
            while kept in dataset.column_names:
                kept = f"original_{kept}"
            logger.warning("%s: %r now holds column %r; its own %r is %r.", entry.path, alias, column, alias, kept)
            dataset = dataset.rename_column(alias, kept)
    return concatenate_datasets([dataset, *aliases], axis=1) if aliases else dataset


def _align(datasets: list[Dataset]) -> list[Dataset]:
    """Gives columns that several datasets have with different types one type that holds every value unchanged."""
    for column in sorted({name for dataset in datasets for name in dataset.column_names}):
        if len(_types(datasets, column)) > 1:
            datasets = [
                dataset.cast_column(column, Value("string"))
                if dataset.features.get(column) == Value("large_string")
                else dataset
                for dataset in datasets
            ]
        kinds = _types(datasets, column)
        if len(kinds) > 1 and not all(map(_is_json, kinds)):
            raise ValueError(
                f"Column {column!r} has different types in the entries: {', '.join(map(str, kinds))}; "
                "save it with one type in all of them, or remove it where it is not needed."
            )
        if len(kinds) > 1:
            datasets = [_as_json(dataset, column) for dataset in datasets]
    return datasets


def _types(datasets: list[Dataset], column: str) -> list[Any]:
    kinds = []
    for dataset in datasets:
        kind = dataset.features.get(column, Value("null"))
        if kind not in (*kinds, Value("null")):
            kinds.append(kind)
    return kinds


def _as_json(dataset: Dataset, column: str) -> Dataset:
    if dataset.features.get(column, Json()) == Json():
        return dataset
    values = [value for batch in column_batches(dataset, column) for value in batch]
    return dataset.remove_columns(column).add_column(column, json_texts(values), feature=cast(Any, Json()))


def _is_json(feature: Any) -> bool:
    """Whether values of this type survive a round trip through JSON (dates, bytes and images do not)."""
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "bool", "null") or feature.dtype.startswith(
            ("int", "uint", "float")
        )
    if isinstance(feature, dict):
        return all(map(_is_json, feature.values()))
    return _is_json(feature.feature) if isinstance(feature, List | LargeList) else isinstance(feature, Json)
