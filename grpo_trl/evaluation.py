"""Evaluation of a set of prompts: sampled over ranks, scored, and summed up once."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset

from .algorithm import combine_rewards
from .metrics import Metrics

if TYPE_CHECKING:
    from .trainer import GRPOTrainer


def evaluate_prompts(trainer: "GRPOTrainer", dataset: Any, prefix: str) -> dict[str, float]:
    """Samples `trainer.sampling.num_generations` completions of every prompt, and scores them.

    Prompts are dealt out over the ranks in turn, and every rank makes the same number of rollouts: a rank that has run
    out samples its last prompt again, and drops the result. The draw number is the row, so each evaluation of a run
    uses the same random numbers.
    """
    rows: Sequence[dict[str, Any]] = list(dataset) if isinstance(dataset, IterableDataset) else dataset
    rank, world_size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    numbers = [rank + i * world_size for i in range(ceil(len(rows) / world_size))]
    size = max(1, trainer.args.per_device_eval_batch_size // trainer.sampling.num_generations)
    records: list[dict[str, Any]] = []
    logged = Metrics()
    for start in range(0, len(numbers), size):
        prompts = [trainer.encode(rows[min(i, len(rows) - 1)], i) for i in numbers[start : start + size]]
        groups = trainer.sample(prompts)
        rewards_per_func = trainer.score(groups, logged)
        for i, group in enumerate(groups):
            if group.prompt.draw < len(rows):
                rewards = rewards_per_func[i * len(group) : (i + 1) * len(group)]
                records.append(
                    {
                        "draw": group.prompt.draw,
                        "rewards": rewards.tolist(),
                        "lengths": [len(ids) for ids in group.completion_ids],
                        "terminated": group.terminated,
                    }
                )
    records = sorted(gather_object(records), key=lambda record: record["draw"])
    results = logged.reduce(gather_object) | summarize(
        records, trainer.reward_names, trainer.reward_weights, trainer.args.eval_pass_threshold
    )
    return {f"{prefix}_{name}": value for name, value in results.items()}


def summarize(
    records: list[dict[str, Any]], names: list[str], weights: torch.Tensor, threshold: float
) -> dict[str, float]:
    """Means over completions, and pass@k over prompts: the share with a completion whose reward reaches `threshold`.

    avg@k is the mean over prompts of the share of its k completions that pass.
    """
    per_func = torch.tensor([row for record in records for row in record["rewards"]])  # (N k, F)
    rewards = combine_rewards(per_func, weights)
    k = len(records[0]["lengths"])
    passed = (rewards >= threshold).view(-1, k)
    lengths = torch.tensor([record["lengths"] for record in records]).double()
    terminated = torch.tensor([record["terminated"] for record in records])
    result = {"reward": rewards.nanmean(), "reward_std": rewards[~rewards.isnan()].std()}
    for name, values in zip(names, per_func.T, strict=True):
        result[f"rewards/{name}/mean"] = values.nanmean()
    result |= {
        f"avg@{k}": passed.double().mean(),
        f"pass@{k}": passed.any(1).double().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/clipped_ratio": (~terminated).double().mean(),
    }
    return {name: float(value) for name, value in result.items() if not value.isnan()}
