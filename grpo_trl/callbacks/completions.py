"""What was sampled: a table on the console, parquet files, and tables of experiment trackers."""

import math
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from rich.markup import escape
from transformers import TrainerState
from transformers.integrations.integration_utils import is_trackio_available, is_wandb_available
from trl.trainer.utils import print_prompt_completions_sample

from ..disk import in_one_move

FOLDER = "completions"
_SHOWN = {"role", "content", "reasoning_content", "thinking"}  # of a message; what else it has is shown behind them
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def log_completions(rows: Sequence[Mapping[str, Any]], *, args: Any, state: TrainerState, mark: str = "") -> None:
    """Prints sampled completions, writes them as parquet and sends them to wandb or trackio; on the main process.

    Args:
        rows: one dict per completion, its keys in this order: `prompt` and `completion` (text or messages), one key
            per reward (a number; None or NaN: not applicable), `advantage`, further columns (a row may lack some).
        args: `output_dir`, `report_to`, `num_completions_to_print` (None: as many as a rollout has), whose choice
            depends on the step alone, and `log_unique_prompts` count.
        state: its `global_step` names the file, `<output_dir>/completions/completions_<step>[_<mark>].parquet`.
        mark: of an evaluation, `eval` or `eval_<set>`: in the title, the file's name and the trackers' key.
    """
    if not rows:
        return
    columns: dict[str, list[Any]] = {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)
    }
    names = list(columns)
    rewards = names[names.index("completion") + 1 : names.index("advantage")]
    extra = names[names.index("advantage") + 1 :]
    number = args.generation_batch_size if args.num_completions_to_print is None else args.num_completions_to_print
    # not TRL's choice, which draws from Python's global generator
    chosen = sorted(random.Random(state.global_step).sample(range(len(rows)), min(number, len(rows))))
    shown = {name: [values[i] for i in chosen] for name, values in columns.items()}
    if chosen:
        print_prompt_completions_sample(
            _entries(shown["prompt"]),  # pyright: ignore[reportArgumentType] - messages, of which TRL knows one form
            _entries(shown["completion"]),  # pyright: ignore[reportArgumentType]
            {escape(name): _numbers(shown[name]) for name in rewards},
            _numbers(shown["advantage"]) if any(a is not None for a in shown["advantage"]) else None,  # an evaluation
            escape(f"{state.global_step} {mark}".strip()),  # pyright: ignore[reportArgumentType] - printed as it is
            extra={escape(name): _entries(shown[name]) for name in extra},
        )
    # the order of TRL's files: advantage last
    table = {name: columns[name] for name in ["prompt", "completion", *rewards, *extra, "advantage"]}
    table = {"step": [state.global_step] * len(rows), **table}
    name = "_".join(filter(None, ("completions", f"{state.global_step:05d}", mark))).replace("/", "_")
    write_parquet(table, Path(args.output_dir) / FOLDER / f"{name}.parquet")
    _log_to_trackers(table, args, "_".join(filter(None, (mark, "completions"))))


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def write_parquet(table: Mapping[str, list], path: Path) -> None:
    """Writes columns as parquet, in one move. A column whose values have no common type, or one that parquet cannot
    hold, is written as text."""
    columns = pa.table({name: _arrow(values) for name, values in table.items()})
    with in_one_move(path) as temporary:
        pyarrow.parquet.write_table(columns, temporary)


def read_parquet(path: Path) -> dict[str, list]:
    """The columns of a file that `write_parquet` wrote."""
    return pyarrow.parquet.read_table(path).to_pydict()


def printable(text: str) -> str:
    """Without the control characters by which a text could clear or rewrite the terminal, and without what its
    encoding does not have."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _entries(values: Sequence[Any]) -> list[Any]:
    """Text or messages in a form of which TRL's printer can make something: tool calls, say, are what was sampled."""
    return [
        [_message(message) for message in value]
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
        else printable(str(value))
        for value in values
    ]


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    reasoning = message.get("reasoning_content") or message.get("thinking")
    others = {k: v for k, v in message.items() if k not in _SHOWN and v is not None}
    content = message.get("content")
    parts = [content if isinstance(content, str) else str(content or ""), str(others) if others else ""]
    shown = {"role": str(message.get("role") or ""), "content": "\n".join(filter(None, parts))}
    if reasoning:
        shown["reasoning_content"] = str(reasoning)
    return {key: printable(text) for key, text in shown.items()}


def _arrow(values: list) -> pa.Array:
    try:
        column = pa.array(values)
        pyarrow.parquet.write_table(pa.table({"column": column}), pa.BufferOutputStream())  # no {}, say
        return column
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        # e.g. answers that are numbers in one data set and text in another
        return pa.array([None if value is None else _writable(str(value)) for value in values])


def _writable(text: str) -> str:
    """Without half of a character, which UTF-8 does not have."""
    return text.encode("utf-8", "backslashreplace").decode()


def _log_to_trackers(table: Mapping[str, list], args: Any, key: str) -> None:
    trackers = _active_trackers(args.report_to or [])
    if not trackers:
        return
    frame = pd.DataFrame({name: _arrow(values).to_pylist() for name, values in table.items()})
    if args.log_unique_prompts:
        # prompts may be conversations, lists of dicts, which cannot be hashed: compared as text
        frame = frame[~frame["prompt"].astype(str).duplicated()]
    for tracker in trackers:
        tracker.log({key: tracker.Table(dataframe=frame)})


def _active_trackers(report_to: Sequence[str]) -> list[Any]:
    """The modules of the trackers in `report_to` that show tables and have a run."""
    trackers = []
    if "wandb" in report_to and is_wandb_available():
        import wandb  # pyright: ignore[reportMissingImports]

        if wandb.run is not None:
            trackers.append(wandb)
    if "trackio" in report_to and is_trackio_available():
        import trackio  # pyright: ignore[reportMissingImports]

        trackers.append(trackio)
    return trackers
