"""`train_datasets` entries -> one dataset with a `prompt` column, checked row by row before any model is loaded."""

import glob
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import fsspec
from datasets import (
    Dataset,
    DatasetDict,
    Json,
    LargeList,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from grpo_trl.prompts import column_batches, prompt_problem, row_problems

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetEntry:
    """One item of `train_datasets`. Strings, except `weight`, a number above 0."""

    path: str  # file, glob or folder; a saved dataset's folder (disk); a Hub id (hub)
    type: str  # a key of LOADERS
    input: str  # column of the prompts
    output: str | None = None  # column of the reference answers
    split: str = "train"  # `datasets` syntax: train[:64], train[10%:], train+test
    weight: float | None = None  # share of the mix
    name: str | None = None  # configuration of a Hub dataset


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


def parse_entries(entries: Sequence[Mapping[str, Any]]) -> list[DatasetEntry]:
    """Checks all entries without reading data; one ValueError lists everything that is wrong with them."""
    if isinstance(entries, str | Mapping) or not isinstance(entries, Sequence) or not entries:
        raise ValueError(f"train_datasets must be a list of entries {{path, type, input, output}}, got {entries!r}.")
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
        raise ValueError("train_datasets:\n  - " + "\n  - ".join(problems))
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
        raise ValueError(f"{_place(entry, row)}, column {column!r}: {problem}{more}.")


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
            # first: CSV's large_string is text like any other, and cast to Json it would be parsed ("72" -> 72)
            datasets = _cast_where(datasets, column, Value("string"), lambda kind: kind == Value("large_string"))
        kinds = _types(datasets, column)
        if len(kinds) > 1 and not all(map(_is_json, kinds)):
            raise ValueError(
                f"Column {column!r} has different types in the entries: {', '.join(map(str, kinds))}; "
                "save it with one type in all of them, or remove it where it is not needed."
            )
        if len(kinds) > 1:
            datasets = _cast_where(datasets, column, Json(), lambda kind: kind != Json())
    return datasets


def _types(datasets: list[Dataset], column: str) -> list[Any]:
    kinds = []
    for dataset in datasets:
        kind = dataset.features.get(column, Value("null"))
        if kind not in (*kinds, Value("null")):
            kinds.append(kind)
    return kinds


def _cast_where(datasets: list[Dataset], column: str, target: Any, condition: Callable[[Any], bool]) -> list[Dataset]:
    return [
        dataset.cast_column(column, target)
        if column in dataset.column_names and condition(dataset.features[column])
        else dataset
        for dataset in datasets
    ]


def _is_json(feature: Any) -> bool:
    """Whether values of this type survive a round trip through JSON (dates, bytes and images do not)."""
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "bool", "null") or feature.dtype.startswith(
            ("int", "uint", "float")
        )
    if isinstance(feature, dict):
        return all(map(_is_json, feature.values()))
    return _is_json(feature.feature) if isinstance(feature, List | LargeList) else isinstance(feature, Json)


# --- data forms ---------------------------------------------------------------------------------------------------


def _load_files(entry: DatasetEntry) -> Dataset:
    files = _data_files(entry)
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: empty file.")
    try:
        rows = _read_files(entry, files)
    except Exception as error:
        raise ValueError(_broken_file(entry, files, error)) from error
    return _take_split({"train": rows}, entry)


def _load_disk(entry: DatasetEntry) -> Dataset:
    folder = _resolve(entry.path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; type disk reads what `Dataset.save_to_disk` wrote.")
    saved = load_from_disk(str(folder))
    splits = {str(name): rows for name, rows in saved.items()} if isinstance(saved, DatasetDict) else {"train": saved}
    return _take_split(splits, entry)


def _load_hub(entry: DatasetEntry) -> Dataset:
    return load_dataset(entry.path, entry.name, split=entry.split)


FILE_BUILDERS = {"parquet": "parquet", "json": "json", "jsonl": "json", "csv": "csv", "arrow": "arrow"}

#: type of an entry -> the function that loads it. A new data form is one more entry here.
LOADERS: dict[str, Callable[[DatasetEntry], Dataset]] = {
    **dict.fromkeys(FILE_BUILDERS, _load_files),
    "disk": _load_disk,
    "hub": _load_hub,
}


def _resolve(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _data_files(entry: DatasetEntry) -> list[Path]:
    """The files that a path (file, folder or glob, relative to the current directory) stands for, sorted."""
    path = _resolve(entry.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        files, what = sorted(path.rglob(f"*.{entry.type}")), f"no *.{entry.type} file in the folder {path}"
    else:
        files, what = sorted(map(Path, glob.glob(str(path), recursive=True))), f"no such file: {path}"
    if not files:
        raise FileNotFoundError(f"train_datasets: {what} (current directory: {Path.cwd()}).")
    return files


def _read_files(entry: DatasetEntry, files: Sequence[Path]) -> Dataset:
    options = {}
    if entry.type == "csv":
        # text stays text: no "007" -> 7, no "NA" -> null; only an empty cell of another column is null
        options = {
            "converters": {column: str for column in (entry.input, entry.output) if column},
            "keep_default_na": False,
            "na_values": [""],
        }
    data_files = [glob.escape(str(file)) for file in files]
    rows = load_dataset(FILE_BUILDERS[entry.type], data_files=data_files, split="train", **options)
    if entry.type == "csv" and "__index_level_0__" in rows.column_names:
        raise ValueError("rows have more fields than the header; quote fields that contain the separator")
    return rows


def _broken_file(entry: DatasetEntry, files: Sequence[Path], error: Exception) -> str:
    """Reads the files one by one to name the one that cannot be read, and for JSON its line."""
    for file in files:
        try:
            _read_files(entry, [file])
        except Exception as own_error:
            if "corresponds to no data" in str(own_error):
                return f"{file}: no rows."
            line = _broken_json_line(file) if FILE_BUILDERS[entry.type] == "json" else None
            reason = line or str(own_error.__cause__ or own_error).strip() or repr(own_error)
            return f"{file}: cannot be read as {entry.type}: {reason.rstrip('.')}."
    # each file is fine, but together they are not, e.g. columns of different types
    return f"{entry.path}: its {len(files)} files cannot be read together: {error.__cause__ or error}"


def _broken_json_line(file: Path) -> str | None:
    with fsspec.open(str(file), "rb", compression="infer") as lines:
        content = lines.read()  # type: ignore[attr-defined]
    if content.lstrip().startswith(b"["):
        return _json_error(content, first_line=1)
    numbered = ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())
    return next((error for number, line in numbered if (error := _json_error(line, number, dict))), None)


def _json_error(content: bytes, first_line: int, expected: type = list) -> str | None:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        return f"line {first_line + error.lineno - 1}, character {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        return f"line {first_line}: {error}"
    if not isinstance(value, expected):
        return f"line {first_line}: expected a JSON object, got {str(value)!r:.80}"
    return None


def _slices(split: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, range(part.from_, part.to)) for part in parts]


def _take_split(splits: dict[str, Dataset], entry: DatasetEntry) -> Dataset:
    try:
        slices = _slices(entry.split, {name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise ValueError(f"{entry.path}: split {entry.split!r}: {error}") from error
    return concatenate_datasets([splits[name].select(rows) for name, rows in slices])


def _place(entry: DatasetEntry, row: int) -> str:
    """Where row `row` of an entry's split comes from: file and row (from 1, a CSV header not counted)."""
    if entry.type not in FILE_BUILDERS:
        return f"{entry.path}, row {row + 1} of split {entry.split!r}"
    files = _data_files(entry)
    lengths = [len(_read_files(entry, [file])) for file in files]
    row = [index for _, rows in _slices(entry.split, {"train": sum(lengths)}) for index in rows][row]
    for file, length in zip(files, lengths, strict=True):
        if row < length:
            return f"{file}, row {row + 1}"
        row -= length
    raise IndexError(f"{entry.path} has no row {row + 1}")  # the files changed while they were read
