"""The demo's GRPO, side by side with TRL: seconds of a whole run, and what it learns.

    python benchmarks/demo_vs_trl.py --repeats 3

The same warm-started policy on both sides; 100 steps of 16 questions x 8 completions, on-policy, no KL, DAPO's loss.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import OURS, RESULTS, alternate, module_of, ratios, report, show
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "demo"))
from arithmetic import build_tokenizer, correct_answer, question, questions, splits
from warm_start import build_policy, warm_start

SIDES = {"trl": {}, "grpo_trl": OURS}
OPTIONS = {
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "num_iterations": 1,
    "max_completion_length": 24,
    "beta": 0.0,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
HELD_EQUAL = ("warm-started policy, tokenizer, questions", "objective, optimizer, batch sizes, steps")


def save_policy(steps: int, folder: str) -> None:
    """The policy that forgets the carry."""
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer, seed=0)
    warm_start(policy, tokenizer, splits()[0], seed=0, output_dir=f"{folder}/warm_start")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any) -> float:
    """Of greedy answers to the held-out questions."""
    pairs = splits()[1]
    chats = [question(*pair) for pair in pairs]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    )
    ids = model.eval().generate(**inputs, do_sample=False, max_new_tokens=24)[:, inputs["input_ids"].shape[1] :]
    replies = [[{"content": text}] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    right = correct_answer(replies, [str(a + b) for a, b in pairs])
    return sum(right) / len(right)


def measure(steps: int, folder: str, seed: int, side: str) -> dict[str, float]:
    """Trains one side."""
    module, tokenizer = module_of(side), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = accuracy(model, tokenizer)
    with tempfile.TemporaryDirectory() as output_dir:
        args = module.GRPOConfig(output_dir, seed=seed, max_steps=steps, **OPTIONS, **SIDES[side])
        trainer = module.GRPOTrainer(
            model, correct_answer, args, train_dataset=questions(splits()[0]), processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "accuracy_before": before, "accuracy_after": accuracy(model, tokenizer)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, alternating")
    parser.add_argument("--output", type=Path, default=RESULTS / "demo_vs_trl.json")
    options = parser.parse_args()
    rows = alternate(measure, options.steps, list(SIDES), options.repeats, save=save_policy)
    found = ratios(rows, "grpo_trl", "trl", ("seconds",))
    show("The demo's GRPO", found)
    report(options, {"options": OPTIONS, "ratios": found, "measurements": rows}, HELD_EQUAL)


if __name__ == "__main__":
    main()
