"""Sampling alone: TRL with `model.generate`, TRL with transformers' continuous batching, and the native engine.

    python benchmarks/rollout_vs_trl.py --repeats 3
    python benchmarks/rollout_vs_trl.py --load a --device cuda --shape qwen3-0.6b --completion-len 1024

Each side samples the same prompts with the same weights. On CUDA the time that reading weights, keys and values takes
at the device's own copy bandwidth is printed beside it (the floor of a rollout).
"""

import tempfile
from statistics import mean, median
from typing import Any

from common import (
    OURS,
    SHAPES,
    Load,
    alternate,
    body_parameters,
    build_prompts,
    check_same_work,
    copy_bandwidth,
    describe,
    loads_of,
    module_of,
    now,
    parser,
    peak_memory,
    ratios,
    report,
    show,
    tolerance_of_lengths,
    trainer_options,
)
from datasets import Dataset

HELD_EQUAL = (
    "weights, dtype, tokenizer, prompts and their order, completions per prompt",
    "EOS ids, temperature, longest completion (lengths differ by chance, their distribution does not)",
)
# a side -> package, further arguments of its GRPOConfig
SIDES = {
    "generate": ("trl", {}),
    "continuous_batching": ("trl", {"use_transformers_continuous_batching": True}),
    "native": ("grpo_trl", OURS),
}
RATIOS = ("tokens_per_second", "seconds", "peak_memory_mib")


def sampler(side: str, trainer: Any, load: Load) -> Any:
    """Prompts as text -> lengths of their completions."""
    if SIDES[side][0] == "trl":
        return lambda prompts: [
            len(ids) for ids in trainer._generate([p for p in prompts for _ in range(load.group)])[1]
        ]

    def sample(prompts: list[str]) -> list[int]:
        encoded = [trainer.encode({"prompt": prompt}, draw) for draw, prompt in enumerate(prompts)]
        return [len(ids) for group in trainer.sample(encoded) for ids in group.completion_ids]

    return sample


def measure(load: Load, folder: str, seed: int, side: str) -> dict[str, float]:
    """Samples `steps` rollouts after one to warm up."""
    package, extras = SIDES[side]
    module = module_of(package)
    prompts = build_prompts(load, load.steps + 1)
    with tempfile.TemporaryDirectory() as output_dir:
        args = module.GRPOConfig(output_dir, **trainer_options(load, seed) | {"beta": 0.0} | extras)
        dataset = Dataset.from_dict({"prompt": prompts})
        trainer = module.GRPOTrainer(folder, lambda completions, **kwargs: [0.0] * len(completions), args, dataset)
    sample, rounds = sampler(side, trainer, load), []
    for start in range(0, len(prompts), load.prompts):
        begin = now(load.device)
        lengths = sample(prompts[start : start + load.prompts])
        rounds.append((now(load.device) - begin, lengths))
    rounds = rounds[1:]
    return {
        "tokens_per_second": median(sum(lengths) / seconds for seconds, lengths in rounds),
        "seconds": median(seconds for seconds, _ in rounds),
        "mean_completion_length": mean(length for _, lengths in rounds for length in lengths),
        "peak_memory_mib": peak_memory(load.device),
    }


def floor_seconds(load: Load, mean_length: float, bandwidth: float) -> float:
    """A rollout at the memory's speed, 16-bit weights and keys: weights once per decoding step, keys and values of
    each prompt once for its group and of each completion's past, until the longest completion ends."""
    shape, prompt = SHAPES[load.shape], sum(load.prompt_len) / 2
    weights = body_parameters(shape) + shape["vocab_size"] * shape["hidden_size"]
    token = shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"]  # keys and values
    rows = load.prompts * load.group
    past = rows * mean_length * mean_length / 2 + load.prompts * prompt * load.completion_len
    return 2 * (weights * load.completion_len + token * past) / bandwidth


def main() -> None:
    options = parser(__doc__ or "", "rollout_vs_trl.json", loads="a,b,c,d")
    options.add_argument("--peers", default="generate,continuous_batching", help="comma-separated")
    options = options.parse_args()
    peers = options.peers.split(",")
    sides, results = [*peers, "native"], {}
    bandwidth = copy_bandwidth() if options.device == "cuda" else None
    for name, load in loads_of(options).items():
        rows = alternate(measure, load, sides, options.repeats)
        check_same_work(rows, "mean_completion_length", tolerance_of_lengths(load, options.repeats))
        results[name] = {"load": describe(load), "measurements": rows}
        for peer in peers:
            found = results[name][f"native / {peer}"] = ratios(rows, "native", peer, RATIOS)
            show(f"({name}) {load}", found, f"native / {peer}")
        if bandwidth is not None:
            length = mean(row["mean_completion_length"] for row in rows)
            floor = floor_seconds(load, length, bandwidth)
            seconds = {side: median(r["seconds"] for r in rows if r["side"] == side) for side in sides}
            results[name] |= {"bandwidth_bytes_per_second": bandwidth, "floor_seconds": floor}
            print(f"floor {floor:.2f} s at {bandwidth / 1e12:.2f} TB/s; share of it:", end=" ")
            print({side: f"{floor / value:.0%}" for side, value in seconds.items()})
        report(options, {"loads": results}, HELD_EQUAL)


if __name__ == "__main__":
    main()
