"""Forward and backward of whole groups on a GPU: seconds, the share of the card's matrix rate, peak memory.

    python benchmarks/learner.py --device cuda --shape qwen3-0.6b --prompt-len 256 --completion-len 1024 --groups 1,2,4

All completions are of full length. The useful work is that of the products with weights, each prompt once, and the
attention that a causal mask leaves; what is computed again for checkpointing or for the scores does not count.
"""

from contextlib import nullcontext
from itertools import product
from statistics import median
from typing import Any

import torch
from common import SHAPES, Load, body_parameters, build_model, describe, loads_of, matrix_rate, now, parser, report
from rich.console import Console
from rich.table import Table

from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy import per_token_logps, prepare

ROUNDS = 5  # timed, after two to warm up


def batch_of(load: Load, groups: int) -> RolloutBatch:
    """Groups of random tokens."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(2, SHAPES[load.shape]["vocab_size"], (length,), generator=draw).tolist()

    length = load.completion_len
    rows = [
        Group(Prompt(ids(load.prompt_len[1]), {}, i), [ids(length) for _ in range(load.group)], [False] * load.group)
        for i in range(groups)
    ]
    return RolloutBatch.from_groups(rows, pad_token_id=0).to(torch.device(load.device))


def useful_flop(load: Load, groups: int) -> float:
    """Of a forward and a backward pass."""
    shape, prompt, length = SHAPES[load.shape], load.prompt_len[1] - 1, load.completion_len
    scored = groups * load.group * length
    products = (
        body_parameters(shape) * (scored + groups * prompt) + shape["vocab_size"] * shape["hidden_size"] * scored
    )
    seen = groups * (prompt * prompt / 2 + load.group * (length * length / 2 + length * prompt))
    attention = 2 * shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * seen
    return 6 * (products + attention)


def evaluate(model: Any, batch: RolloutBatch, load: Load) -> float:
    """One forward and backward; returns what was differentiated."""
    autocast = torch.autocast(load.device, torch.bfloat16) if load.dtype == "float32" else nullcontext()
    with autocast:
        logps, _ = per_token_logps(model, batch, with_entropy=True)
    mean = logps.sum() / batch.completion_mask.sum()
    mean.backward()
    return float(mean.detach())  # which waits for the device


def measure(model: Any, load: Load, groups: int) -> dict[str, float]:
    """Medians of the timed rounds."""
    batch, seconds = batch_of(load, groups), []
    for number in range(2 + ROUNDS):
        model.zero_grad(set_to_none=False)
        if number == 2 and load.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = now(load.device)
        mean = evaluate(model, batch, load)
        seconds.append(now(load.device) - start)
    rate = useful_flop(load, groups) / median(seconds[2:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if load.device == "cuda" else 0.0
    return {"seconds": median(seconds[2:]), "tflops": rate / 1e12, "peak_gib": peak, "mean_logp": mean}


def profile(model: Any, load: Load, groups: int) -> None:
    """Prints which kernels, and which calls, take the time."""
    batch = batch_of(load, groups)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        evaluate(model, batch, load)
    for key in ("self_cuda_time_total", "self_cpu_time_total"):
        print(found.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=70))


def with_liger(model: Any) -> None:
    """As `use_liger_kernel` does it."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"fused_linear_cross_entropy": False})


def main() -> None:
    options = parser(__doc__ or "", "learner.json")
    options.add_argument("--groups", default="1,2", help="comma-separated: groups in a forward pass")
    options.add_argument("--checkpointing", default="off,on")
    options.add_argument("--profile", action="store_true", help="also print a profile of the last of each")
    options = options.parse_args()
    (load,) = loads_of(options).values()
    rate = matrix_rate() if load.device == "cuda" else None
    model = build_model(load)
    model.train()
    if trouble := prepare(model):
        raise RuntimeError(trouble)
    if load.liger:
        with_liger(model)
    table, rows = Table("checkpointing", "groups", "seconds", "TFLOP/s", "share", "peak, GiB"), []
    for checkpointing, groups in product(options.checkpointing.split(","), map(int, options.groups.split(","))):
        if checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        row: dict[str, Any] = {"checkpointing": checkpointing, "groups": groups} | measure(model, load, groups)
        row["share"] = rate and row["tflops"] * 1e12 / rate
        rows.append(row)
        cells = (f"{row[name]:.3g}" if row[name] is not None else "" for name in ("tflops", "share", "peak_gib"))
        table.add_row(checkpointing, str(groups), f"{row['seconds']:.3f}", *cells)
        if options.profile:
            profile(model, load, groups)
    Console(highlight=False).print(table)
    report(options, {"load": describe(load), "matrix_flop_per_second": rate, "measurements": rows}, held_equal=())


if __name__ == "__main__":
    main()
