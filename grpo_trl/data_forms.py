"""The data forms: one loader function per `type` of a `train_datasets` entry, in `LOADERS`."""

import codecs
import glob
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
from datasets import Dataset, DatasetDict, Json, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError


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


def _load_files(entry: DatasetEntry) -> Dataset:
    files = _data_files(entry)
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: empty file.")
    try:
        rows = _read_files(entry, files)
    except Exception as error:
        raise ValueError(_broken_files(entry, files, error)) from error
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


FILE_TYPES = ("parquet", "json", "jsonl", "csv", "arrow")

#: type of an entry -> the function that loads it. A new data form is one more entry here.
LOADERS: dict[str, Callable[[DatasetEntry], Dataset]] = {
    **dict.fromkeys(FILE_TYPES, _load_files),
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
        found, what = path.rglob(f"*.{entry.type}"), f"no *.{entry.type} file in this folder"
        # as in a glob: `.ipynb_checkpoints` and the like are none of the data
        files = sorted(file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts))
    else:
        found, what = map(Path, glob.glob(str(path), recursive=True)), "no such file"
        files = sorted(file for file in found if file.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: {what} (current directory: {Path.cwd()}).")
    return files


def _read_files(entry: DatasetEntry, files: Sequence[Path]) -> Dataset:
    if entry.type in ("json", "jsonl"):
        return _from_rows([row for file in files for row in _json_rows(file)])
    options = {}
    if entry.type == "csv":
        # text stays text: no "007" -> 7, no "NA" -> null; only an empty cell of another column is null
        options = {
            "converters": {column: str for column in (entry.input, entry.output) if column},
            "keep_default_na": False,
            "na_values": [""],
        }
    data_files = [glob.escape(str(file)) for file in files]
    rows = load_dataset(entry.type, data_files=data_files, split="train", **options)
    if entry.type == "csv" and "__index_level_0__" in rows.column_names:
        raise ValueError("rows have more fields than the header; quote fields that contain the separator")
    return rows


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file that holds one JSON array of objects, or one object per line (compressed or not).

    Not read through `load_dataset("json")`, which turns dates into timestamps, the text "72" in a column of mixed
    types into a number, and values of a second file or chunk into the type of the first.
    """
    with fsspec.open(str(file), "rb", compression="infer") as opened:
        content = opened.read()  # type: ignore[attr-defined]
    content = content.removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        rows = [(f"item {i}", row) for i, row in enumerate(_parse_json(content, line=1), 1)]
    else:
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        rows = [(f"line {number}", _parse_json(line, number)) for number, line in lines]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {row!r:.80}")
    return [row for _, row in rows]


def _parse_json(content: bytes, line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line + error.lineno - 1}, character {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"line {line}: {error}") from error


def _from_rows(rows: Sequence[dict[str, Any]]) -> Dataset:
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain(*rows))}
    mixed = [name for name, values in columns.items() if not _has_one_type(name, values)]
    dataset = Dataset.from_dict(columns | {name: json_texts(columns[name]) for name in mixed})
    for name in mixed:
        dataset = dataset.cast_column(name, cast(Any, Json()))
    return dataset


def json_texts(values: Sequence[Any]) -> Any:
    """The values as the JSON texts that make up a column of type `Json`, where each value has a type of its own."""
    # `datasets` takes text that parses as JSON for JSON: without the quotes added here, "72" would come back as 72
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]


def _has_one_type(name: str, values: Sequence[Any]) -> bool:
    """Of Arrow's. Raises ValueError for whole numbers that none holds."""
    try:
        pa.array(values)
    except OverflowError as error:
        raise ValueError(f"column {name!r} has a whole number beyond 64 bit; put it in quotes.") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return False
    return True


def _broken_files(entry: DatasetEntry, files: Sequence[Path], error: Exception) -> str:
    """Reads the files one by one to name the one that cannot be read."""
    for file in files:
        try:
            _read_files(entry, [file])
        except Exception as own_error:
            if "corresponds to no data" in str(own_error):
                return f"{file}: no rows."
            reason = own_error.__cause__ if isinstance(own_error, DatasetGenerationError) else own_error
            return f"{file}: cannot be read as {entry.type}: {str(reason).strip() or repr(reason)}"
    # each file is fine, but together they are not, e.g. columns of different types
    return f"{entry.path}: its {len(files)} files cannot be read together: {error.__cause__ or error}"


def _slices(split: str, lengths: dict[str, int]) -> list[tuple[str, range]]:
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, range(part.from_, part.to)) for part in parts if part.from_ < part.to]


def _take_split(splits: dict[str, Dataset], entry: DatasetEntry) -> Dataset:
    try:
        slices = _slices(entry.split, {name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise ValueError(f"{entry.path}: split {entry.split!r}: {error}") from error
    if not slices:
        return next(iter(splits.values())).select([])
    return concatenate_datasets([splits[name].select(rows) for name, rows in slices])


def place(entry: DatasetEntry, row: int) -> str:
    """Where row `row` (from 0) of an entry's split is: file and row (from 1, a CSV header not counted), for errors."""
    if entry.type not in FILE_TYPES:
        return f"{entry.path}, row {row + 1} of split {entry.split!r}"
    files = _data_files(entry)
    lengths = [len(_read_files(entry, [file])) for file in files]
    row = [index for _, rows in _slices(entry.split, {"train": sum(lengths)}) for index in rows][row]
    for file, length in zip(files, lengths, strict=True):
        if row < length:
            return f"{file}, row {row + 1}"
        row -= length
    raise IndexError(f"{entry.path} has no row {row + 1}")  # the files changed while they were read
