"""A collection on disk, as parquet: everything that an update needs, and the text. `GRPOTrainer` writes one file per
collection and rank with `log_rollouts`, and trains on them again with `replay_rollouts`.

Numbers round-trip exactly: ids are integers, rewards of the functions fp64, log-probabilities and advantages fp32.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from ..batch import Group, Prompt, RolloutBatch, pad_rows
from ..config import GRPOConfig
from ..disk import in_one_move

FOLDER = "rollouts"
RANKS, SETTINGS = b"ranks", b"settings"  # in the metadata of each file: a rank's is one of so many; `settings_of`
OF_ADVANTAGES = ("scale_rewards", "advantage_baseline", "multi_objective_aggregation", "reward_weights")
REWARD = "rewards/"  # columns of the reward functions: this and their name
NAME = re.compile(r"rollout_(\d+)_rank_(\d+)\.parquet")
# (B, T) fields of a `RolloutBatch` that are stored, and their columns
LOGPS = {
    "sampling_per_token_logps": "sampling_logps",
    "old_per_token_logps": "old_logps",
    "ref_per_token_logps": "ref_logps",
}


@dataclass
class Rollout:
    """What was collected at once on one rank.

    `groups` are those of the batch, with their text; a group whose draw is -1 fills a place that dynamic sampling left
    empty. `rewards` is (B,), the weighted sums. `batch` holds advantages and log-probabilities. `settings` are those
    of the run (`settings_of`).
    """

    groups: list[Group]
    batch: RolloutBatch
    rewards: Tensor
    reward_names: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def differs(self, settings: dict[str, Any], names: Sequence[str]) -> bool:
        """Whether one of these settings is another here; one that a file does not say is taken for the same."""
        return any(self.settings.get(name, settings[name]) != settings[name] for name in names)


def settings_of(args: GRPOConfig, reward_weights: Tensor) -> dict[str, Any]:
    """What stored completions and advantages depend on."""
    names = ("num_generations", "temperature", *OF_ADVANTAGES)
    return {name: getattr(args, name) for name in names} | {"reward_weights": reward_weights.tolist()}


def file_name(collection: int, rank: int) -> str:
    """Of the file of a collection (numbered from 0, over all epochs) and a rank."""
    return f"rollout_{collection:06d}_rank_{rank}.parquet"


def write_rollout(path: Path, rollout: Rollout, *, step: int, ranks: int = 1) -> None:
    """Writes a rollout in one move, a row per completion; `step` is the number of optimizer steps made before, `ranks`
    how many write a file of it."""
    groups, batch = rollout.groups, rollout.batch
    assert batch.advantages is not None
    rows = [(group, row) for group in groups for row in range(len(group))]
    lengths = [len(group.completion_ids[row]) for group, row in rows]
    columns: dict[str, pa.Array] = {
        "step": pa.array([step] * len(rows), pa.int64()),
        "draw": pa.array([group.prompt.draw for group, _ in rows], pa.int64()),
        "prompt": pa.array([_text(group.prompt.example.get("prompt")) for group, _ in rows], pa.string()),
        "prompt_ids": pa.array([group.prompt.ids for group, _ in rows], pa.list_(pa.int64())),
        "completion": pa.array(
            [_text(group.completions[row]) if group.completions else None for group, row in rows], pa.string()
        ),
        "completion_ids": pa.array([group.completion_ids[row] for group, row in rows], pa.list_(pa.int64())),
        "terminated": pa.array([group.terminated[row] for group, row in rows], pa.bool_()),
        "loss_mask": pa.array(
            [
                group.loss_masks[row] if group.loss_masks else [1] * length
                for (group, row), length in zip(rows, lengths, strict=True)
            ],
            pa.list_(pa.int8()),
        ),
    }
    for name, column in LOGPS.items():
        values = getattr(batch, name)
        ragged = None if values is None else [row[:n] for row, n in zip(values.tolist(), lengths, strict=True)]
        columns[column] = pa.array(ragged or [None] * len(rows), pa.list_(pa.float32()))
    for index, name in enumerate(rollout.reward_names):
        values = [
            math.nan if group.rewards_per_func is None else float(group.rewards_per_func[row, index])
            for group, row in rows
        ]
        columns[f"{REWARD}{name}"] = pa.array(values, pa.float64(), from_pandas=True)  # NaN: null, not applicable
    columns["reward"] = pa.array(rollout.rewards.tolist(), pa.float32(), from_pandas=True)
    columns["advantage"] = pa.array(batch.advantages.tolist(), pa.float32())
    metadata = {RANKS: str(ranks), SETTINGS: json.dumps(rollout.settings)}
    with in_one_move(path) as temporary:
        parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), temporary)


def read_rollout(path: Path, *, num_generations: int, pad_token_id: int, mask_truncated_completions: bool) -> Rollout:
    """What `write_rollout` wrote. Truncated completions are masked anew; text of messages stays JSON.

    Raises:
        FileNotFoundError: there is no such file; says which collections there are.
        ValueError: a file that is none of ours, or whose groups are not of `num_generations`.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {_held(path.parent)}. Set max_steps so that it suffices.")
    read = parquet.read_table(path)
    table, settings = read.to_pydict(), json.loads((read.schema.metadata or {}).get(SETTINGS, b"{}"))
    missing = {"draw", "prompt_ids", "completion_ids", "terminated", "loss_mask", "advantage"} - table.keys()
    if missing:
        raise ValueError(f"{path} is no rollout that log_rollouts wrote: it lacks {', '.join(sorted(missing))}.")
    starts = range(0, len(table["draw"]), num_generations)
    whole = all(len(set(table["draw"][start : start + num_generations])) == 1 for start in starts)
    written = settings.get("num_generations", num_generations)
    if not whole or len(table["draw"]) % num_generations or written != num_generations:
        raise ValueError(
            f"{path} does not hold groups of num_generations={num_generations}; set what it was written with."
        )
    names = [name.removeprefix(REWARD) for name in table if name.startswith(REWARD)]
    groups = [_group(table, slice(start, start + num_generations), names) for start in starts]
    batch = RolloutBatch.from_groups(
        groups, pad_token_id=pad_token_id, mask_truncated_completions=mask_truncated_completions
    )
    batch.advantages = torch.tensor(table["advantage"], dtype=torch.float32)
    for name, column in LOGPS.items():
        if None not in table[column]:
            setattr(batch, name, pad_rows(table[column], 0.0))
    return Rollout(groups, batch, _tensor(table["reward"]).float(), names, settings)


def check_ranks(folder: Path, collection: int, world_size: int) -> None:
    """Raises ValueError where a collection was written by another number of ranks: each would read a part of it."""
    path = folder / file_name(collection, 0)
    metadata = (parquet.read_schema(path).metadata or {}) if path.is_file() else {}
    written = int(metadata.get(RANKS, world_size))
    if written != world_size:
        raise ValueError(
            f"{folder}: collection {collection} was written by {written} ranks, and this run has {world_size}; replay "
            "it with as many."
        )


def replay_problems(rollout: Rollout, args: GRPOConfig, reward_names: Sequence[str], path: Path) -> list[str]:
    """Why a rollout that was read cannot be trained on with this configuration."""
    expected, batch = args.completions_per_rank, rollout.batch
    found = []
    if rollout.reward_names != list(reward_names):
        found.append(
            f"{path} holds rewards of {', '.join(rollout.reward_names)}, and this run has {', '.join(reward_names)} "
            "(overlong_penalty is one); give those, in that order."
        )
    if (temperature := rollout.settings.get("temperature", args.temperature)) != args.temperature:
        found.append(
            f"{path} was sampled, and its log-probabilities taken, at temperature={temperature}; set that, not "
            f"{args.temperature}."
        )
    if len(batch) != expected:
        found.append(
            f"{path} holds {len(batch)} completions, but "
            f"per_device_train_batch_size={args.per_device_train_batch_size} x "
            f"steps_per_generation={args.steps_per_generation} is {expected}; set what it was written with."
        )
    if args.beta and batch.ref_per_token_logps is None:
        found.append(f"{path} has no log-probabilities of a reference, which beta={args.beta} needs; set beta: 0.")
    if batch.old_per_token_logps is None and not args.on_policy:
        found.append(
            f"{path} has no old log-probabilities: it was written by a run of one update per rollout; set "
            "num_iterations: 1 and steps_per_generation to gradient_accumulation_steps."
        )
    if args.sampler_correction and batch.sampling_per_token_logps is None:
        found.append(f"{path} has no log-probabilities of sampling, which sampler_correction needs; leave it out.")
    return found


def _group(table: dict[str, list], rows: slice, reward_names: Sequence[str]) -> Group:
    prompt = Prompt(
        table["prompt_ids"][rows.start], {"prompt": table["prompt"][rows.start]}, table["draw"][rows.start]
    )
    return Group(
        prompt,
        table["completion_ids"][rows],
        table["terminated"][rows],
        loss_masks=table["loss_mask"][rows],
        completions=table["completion"][rows],
        rewards_per_func=torch.stack([_tensor(table[f"{REWARD}{name}"][rows]) for name in reward_names], 1),
    )


def _tensor(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "backslashreplace").decode()  # half of a character, which UTF-8 does not have


def _held(folder: Path) -> str:
    """What a folder has, in words."""
    found = [match for path in folder.glob("*.parquet") if (match := NAME.fullmatch(path.name))]
    if not found:
        return f"{folder} holds no rollouts"
    collections, ranks = (sorted({int(match[part]) for match in found}) for part in (1, 2))
    return (
        f"{folder} holds collections {collections[0]} to {collections[-1]} of {len(ranks)} "
        f"rank{'s' if len(ranks) > 1 else ''}"
    )
