"""Evaluation of a set of prompts: which rank samples what, and how the results are summed up."""

from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any

from accelerate.utils import gather_object
from datasets import IterableDataset
from torch import Tensor, float64, tensor

from .algorithm import combine_rewards
from .batch import Group
from .metrics import Metrics, completion_rows
from .prompts import check_prompt_dataset


def evaluate_sets(
    trainer: Any, datasets: Any, prefix: str, fit: Callable[[Any], Any] = lambda dataset: dataset
) -> dict[str, float]:
    """Evaluates and logs one set, or named ones, whose mean reward is then `<prefix>_reward`: what a best model is
    judged by, when no set is named. `fit` is applied to each, once it is known to be a set of prompts.

    Raises:
        ValueError: there is no set, one has no prompts, or a name is none.
    """
    if datasets is None or (isinstance(datasets, dict) and not datasets):
        raise ValueError("evaluate() needs an eval_dataset; pass one here or to GRPOTrainer.")
    if isinstance(datasets, dict):
        check_set_names(datasets, trainer.args.log_completions)
        datasets = {str(name): dataset for name, dataset in datasets.items()}
    named = datasets if isinstance(datasets, dict) else {"": datasets}
    metrics: dict[str, float] = {}
    for name, dataset in named.items():
        check_prompt_dataset(dataset, where=f"eval_dataset {name}".strip())
        set_prefix = f"{prefix}_{name}" if name else prefix
        summary, rows = evaluate_prompts(trainer, fit(dataset))
        results = {f"{set_prefix}_{key}": value for key, value in summary.items()}
        trainer.log(results)
        trainer.show_completions(rows, set_prefix)
        metrics |= results
    if isinstance(datasets, dict):
        # a set in which no reward applied has none
        rewards = [metrics[key] for name in named if (key := f"{prefix}_{name}_reward") in metrics]
        mean = {f"{prefix}_reward": sum(rewards) / len(rewards)} if rewards else {}
        trainer.log(dict(mean))
        metrics |= mean
    return metrics


def check_set_names(names: Iterable[Any], with_files: bool) -> None:
    """Raises ValueError unless each can stand in the names of metrics, and in those of files of completions where
    there are some, and be told from the others there."""
    taken: dict[str, Any] = {}
    for name in names:
        text = str(name)
        if not text:
            raise ValueError("eval_dataset: the name of a set is empty; metrics are named after it.")
        other = taken.setdefault(text.replace("/", "_") if with_files else text, name)
        if other != name:
            raise ValueError(f"eval_dataset: {other!r} and {name!r} would have the same metrics or files; rename one.")


def evaluate_prompts(trainer: Any, dataset: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Samples and scores every prompt once, over all ranks, with the `trainer`'s current sampling parameters.

    The draw number is the row, so each evaluation of a run uses the same random numbers. Returns the metrics and, with
    `log_completions`, one row of a table per completion, in the order of the dataset.
    """
    rows = list(dataset) if isinstance(dataset, IterableDataset) else dataset
    mine = rows_of_rank(len(rows), trainer.accelerator.process_index, trainer.accelerator.num_processes)
    size = max(1, trainer.args.per_device_eval_batch_size // trainer.sampling.num_generations)
    results, table, logged = [], [], Metrics()
    for start in range(0, len(mine), size):
        prompts = [trainer.encode(rows[min(row, len(rows) - 1)], row) for row in mine[start : start + size]]
        groups = [group for group in trainer.sample(prompts) if group.prompt.draw < len(rows)]
        if groups:
            rewards = trainer.score(groups, logged)
            results += records(groups, rewards)
            if trainer.args.log_completions:
                no_advantages = [None] * len(rewards)
                shown = completion_rows(groups, rewards, no_advantages, trainer.reward_names, trainer.extra_columns)
                draws = [group.prompt.draw for group in groups for _ in range(len(group))]
                table += zip(draws, shown, strict=True)
    results = gather_object(results)
    table = sorted(gather_object(table), key=lambda entry: entry[0]) if trainer.args.log_completions else []
    summary = summarize(results, trainer.reward_names, trainer.reward_weights, trainer.args.eval_pass_threshold)
    of_rewards = logged.reduce(gather_object)
    for name in of_rewards.keys() & summary.keys():
        logged.refuse(name)
    return of_rewards | summary, [row for _, row in table]


def rows_of_rank(num_rows: int, rank: int, world_size: int) -> list[int]:
    """Rows are dealt out over the ranks in turn; every rank gets the same number, so that none waits for another in
    a collective. Numbers beyond the last row stand for repeats, to be dropped."""
    return [rank + i * world_size for i in range(ceil(num_rows / world_size))]


def records(groups: Sequence[Group], rewards_per_func: Tensor) -> list[dict[str, Any]]:
    """One picklable record per prompt, from rewards (B, F) in the order of the groups."""
    sizes = [len(group) for group in groups]
    return [
        {
            "row": group.prompt.draw,
            "rewards": rewards.tolist(),
            "lengths": [len(ids) for ids in group.completion_ids],
            "terminated": group.terminated,
        }
        for group, rewards in zip(groups, rewards_per_func.split(sizes), strict=True)
    ]


def summarize(
    results: Sequence[dict[str, Any]], reward_names: Sequence[str], reward_weights: Tensor, pass_threshold: float
) -> dict[str, float]:
    """Means over the completions of all prompts, k each.

    A completion passes a reward function when its reward reaches `pass_threshold`; avg@k is the share of completions
    that pass, pass@k the share of prompts with at least one. Each function has its `rewards/<name>/pass@k`; `avg@k`
    and `pass@k` alone are those of the first function. Completions and prompts to which a function does not apply
    count in none of its figures.
    """
    results = sorted(results, key=lambda record: record["row"])  # so that sums do not depend on the ranks
    rewards_per_func = tensor([row for record in results for row in record["rewards"]], dtype=float64)  # (N k, F)
    rewards = combine_rewards(rewards_per_func, reward_weights).double()
    applied = rewards[~rewards.isnan()]
    k = len(results[0]["lengths"])
    lengths = tensor([record["lengths"] for record in results]).double()
    truncated = ~tensor([record["terminated"] for record in results])
    values = {"reward": applied.mean(), "reward_std": applied.std(correction=min(1, len(applied) - 1))}
    for index, (name, column) in enumerate(zip(reward_names, rewards_per_func.T, strict=True)):
        if column.isnan().all():
            continue
        passed = (column.float() >= pass_threshold).double().view(-1, k)  # rewards are fp32: 0.7 must reach 0.7
        applies = ~column.isnan().view(-1, k)
        pass_at_k = passed.amax(1)[applies.any(1)].mean()
        values |= {f"rewards/{name}/mean": column.nanmean(), f"rewards/{name}/pass@{k}": pass_at_k}
        if index == 0:
            values |= {f"avg@{k}": passed[applies].mean(), f"pass@{k}": pass_at_k}
    values |= {
        "completions/mean_length": lengths.mean(),
        "completions/clipped_ratio": truncated.double().mean(),
    }
    return {name: float(value) for name, value in values.items() if not value.isnan()}
