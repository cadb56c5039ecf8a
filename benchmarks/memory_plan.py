"""The planned peak of memory against the measured one, on real training steps of three shapes.

python benchmarks/memory_plan.py [--device cuda] [--output benchmarks/results/memory_plan.json]

Each shape trains in a process of its own. On the CPU the peak is that of resident memory (VmHWM of /proc/self/status)
over what it was before the models were loaded; on CUDA it is the allocator's counter. glibc's malloc keeps freed
blocks in its heap, and the larger they are the longer it runs, so each shape is measured twice: with a fixed
MALLOC_MMAP_THRESHOLD_, where every large tensor is a mapping of its own that goes back when it is freed, and as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from common import RESULTS, build_tokenizer, report
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from grpo_trl import GRPOConfig
from grpo_trl.memory import PolicySpec, Run, plan_run

TOLERANCE = 0.15
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
VOCABULARY, EOS, PAD, PROMPT = 16384, 1, 0, 64
STEPS = 3

POLICY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
# layers of the policy and of the reward model (0: none), whether an adapter is trained, fields of GRPOConfig
SHAPES: dict[str, dict[str, Any]] = {
    "full": {
        "layers": 9, "reward_layers": 0, "lora": False,
        "args": {"per_device_train_batch_size": 8, "max_completion_length": 128, "gradient_checkpointing": False},
    },
    "lora": {
        "layers": 17, "reward_layers": 0, "lora": True,
        "args": {"per_device_train_batch_size": 8, "max_completion_length": 128, "gradient_checkpointing": False},
    },
    "reward_model": {
        "layers": 9, "reward_layers": 17, "lora": False,
        "args": {"per_device_train_batch_size": 16, "max_completion_length": 96, "gradient_checkpointing": True,
                 "gradient_accumulation_steps": 2},
    },
}  # fmt: skip


def save_models(shape: dict[str, Any], folder: Path) -> None:
    """Random weights and a tokenizer of words, from where the run loads them."""
    load = common.Load(shape="small")
    tokenizer = build_tokenizer(load)
    torch.manual_seed(0)
    models = {"policy": Qwen3ForCausalLM(Qwen3Config(**POLICY, num_hidden_layers=shape["layers"]))}
    if shape["reward_layers"]:
        config = Qwen3Config(**POLICY, num_hidden_layers=shape["reward_layers"], num_labels=1)
        models["reward"] = Qwen3ForSequenceClassification(config)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run_of(shape: dict[str, Any], folder: Path, device: str) -> Run:
    """What is planned and trained."""
    args = GRPOConfig(
        str(folder / "out"), use_cpu=device == "cpu", bf16=False, num_generations=8, num_iterations=1, max_steps=STEPS,
        max_prompt_length=PROMPT, report_to="none", save_strategy="no", save_epochs=False, plot_metrics=False,
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no", **shape["args"],
    )  # fmt: skip
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear") if shape["lora"] else None
    rewards = (str(folder / "reward"),) if shape["reward_layers"] else ()
    return Run(PolicySpec(str(folder / "policy"), peft_config=adapter), rewards, args)


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Differs within a group, so that there is a gradient."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def measured_peak(run: Run, device: str) -> int:
    """Bytes that real training takes at most, over what the process had before its models."""
    from grpo_trl import GRPOTrainer

    prompts = [" ".join(f"w{2 + (7 * i + j) % 4000}" for j in range(PROMPT)) for i in range(16)]
    x = torch.randn(512, 512)
    x @ x  # the libraries' own buffers
    before = status("VmRSS")
    trainer = GRPOTrainer(
        run.policy.path, [*run.rewards, reward], run.args, Dataset.from_dict({"prompt": prompts}),
        peft_config=run.policy.peft_config,
    )  # fmt: skip
    Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak of training
    trainer.train()
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM") - before


def status(name: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measure(name: str, folder: str, device: str, env: dict[str, str]) -> int:
    """`measured_peak` in a child."""
    command = [sys.executable, __file__, "--child", name, "--folder", folder, "--device", device]
    result = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, check=True, text=True)
    return int(result.stdout.splitlines()[-1])


def compare(name: str, device: str) -> dict[str, Any]:
    """Plan and measurements of a shape."""
    with tempfile.TemporaryDirectory() as folder:
        save_models(SHAPES[name], Path(folder))
        plan = plan_run(run_of(SHAPES[name], Path(folder), device))
        (planned,) = plan.devices.values()
        row: dict[str, Any] = {"planned": planned.peak, "phases": planned.phases, "items": dict(planned.items)}
        row["measured"] = measure(name, folder, device, MAPPED)
        row["ratio"] = row["planned"] / row["measured"]
        if device == "cpu":
            row["measured_default_malloc"] = measure(name, folder, device, {})
            row["ratio_default_malloc"] = row["planned"] / row["measured_default_malloc"]
    print(json.dumps({name: row}), file=sys.stderr, flush=True)
    return row


def show(rows: dict[str, dict[str, Any]], output: Path) -> None:
    """The comparison, on the screen and as Markdown beside the JSON."""
    titles = ["shape", "planned, GiB", "measured, GiB", "planned / measured", "with malloc as it is"]
    lines = [
        [name, *(f"{row[key] / 2**30:.2f}" for key in ("planned", "measured"))]
        + [f"{row[key]:.2f}" for key in ("ratio", "ratio_default_malloc") if key in row]
        for name, row in rows.items()
    ]
    table = Table(*titles, title="Peak memory")
    for line in lines:
        table.add_row(*line)
    Console(highlight=False).print(table)
    text = [titles, ["---"] * len(titles), *lines]
    output.with_suffix(".md").write_text("".join(f"| {' | '.join(line)} |\n" for line in text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda has not been tried")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_plan.json", help="JSON; Markdown beside it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = run_of(SHAPES[options.child], options.folder, options.device)
        print(measured_peak(run, options.device))
        return
    rows = {name: compare(name, options.device) for name in options.shapes.split(",")}
    del options.child, options.folder
    report(options, {"shapes": SHAPES, "measurements": rows}, held_equal=())
    show(rows, options.output)
    far = [name for name, row in rows.items() if abs(row["ratio"] - 1) > TOLERANCE]
    if far:
        raise SystemExit(f"More than {TOLERANCE:.0%} off: {', '.join(far)}.")


if __name__ == "__main__":
    main()
