"""What was sampled: a table on the console, parquet files, and tables of experiment trackers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from transformers import TrainerState
from transformers.integrations import is_trackio_available, is_wandb_available
from trl.trainer.utils import print_prompt_completions_sample

FOLDER = "completions"


def log_completions(
    rows: Sequence[Mapping[str, Any]], *, reward_names: Sequence[str], args: Any, state: TrainerState
) -> None:
    """Prints sampled completions, writes them as parquet and sends them to wandb or trackio; on the main process.

    Args:
        rows: one dict per completion: `prompt` and `completion` (text or messages), a number or None under each of
            `reward_names`, `advantage`, any further columns, and `step` (default: the current step).
        reward_names: the columns that are rewards.
        args: `output_dir`, `report_to`, `num_completions_to_print` (None: all) and `log_unique_prompts` count.
        state: its `global_step` names the file, `<output_dir>/completions/completions_<step>.parquet`.
    """
    if not rows:
        return
    table = _table(rows, reward_names, state.global_step)
    rewards = {name: [float("nan") if value is None else value for value in table[name]] for name in reward_names}
    extra = {name: values for name, values in table.items() if name not in {*_fixed_columns(reward_names)}}
    print_prompt_completions_sample(
        table["prompt"],
        table["completion"],
        rewards,
        table["advantage"],
        state.global_step,
        args.num_completions_to_print,
        extra=extra,
    )
    write_parquet(table, Path(args.output_dir) / FOLDER / f"completions_{state.global_step:05d}.parquet")
    _log_to_trackers(table, args)


def write_parquet(table: Mapping[str, list], path: Path) -> None:
    """Writes columns as parquet, in one move. A column whose values have no common type is written as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"_{path.name}")
    pyarrow.parquet.write_table(pa.table({name: _arrow(values) for name, values in table.items()}), temporary)
    os.replace(temporary, path)


def _fixed_columns(reward_names: Sequence[str]) -> list[str]:
    return ["step", "prompt", "completion", *reward_names, "advantage"]


def _table(rows: Sequence[Mapping[str, Any]], reward_names: Sequence[str], step: int) -> dict[str, list]:
    """Columns in TRL's order: step, prompt, completion, rewards, the further ones, advantage."""
    fixed = _fixed_columns(reward_names)
    extra = dict.fromkeys(name for row in rows for name in row if name not in fixed)
    return {name: [row.get(name, step if name == "step" else None) for row in rows] for name in [*fixed[:-1], *extra, fixed[-1]]}


def _arrow(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        # e.g. answers that are numbers in one data set and text in another
        return pa.array([None if value is None else str(value) for value in values])


def _log_to_trackers(table: Mapping[str, list], args: Any) -> None:
    trackers = _active_trackers(args.report_to or [])
    if not trackers:
        return
    frame = pd.DataFrame(table)
    if args.log_unique_prompts:
        # prompts may be conversations, lists of dicts, which cannot be hashed: compared as text
        frame = frame[~frame["prompt"].astype(str).duplicated()]
    for tracker in trackers:
        tracker.log({"completions": tracker.Table(dataframe=frame)})


def _active_trackers(report_to: Sequence[str]) -> list[Any]:
    """The modules of the trackers in `report_to` that show tables and have a run."""
    trackers = []
    if "wandb" in report_to and is_wandb_available():
        import wandb

        if wandb.run is not None:
            trackers.append(wandb)
    if "trackio" in report_to and is_trackio_available():
        import trackio

        trackers.append(trackio)
    return trackers
