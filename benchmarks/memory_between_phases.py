"""What `gc.collect()` between the phases of a step would bring: what only it frees, and its time.

python benchmarks/memory_between_phases.py [--output benchmarks/results/memory_between_phases.json]
"""

import argparse
import gc
import json
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from grpo_trl import GRPOConfig, GRPOTrainer


class Measured(GRPOTrainer):
    """Collects garbage after each rollout and each optimizer step, with the automatic collector off."""

    found: list[tuple[str, int, int, float]] = []

    def collect(self, prompts):
        batch = super().collect(prompts)
        self.measure("rollout")
        return batch

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.measure("update")
        return loss

    def measure(self, phase: str) -> None:
        gc.set_debug(gc.DEBUG_SAVEALL)  # unreachable objects go to gc.garbage, where they can be counted
        start = time.perf_counter()
        objects = gc.collect()
        seconds = time.perf_counter() - start
        tensors = sum(x.nbytes for x in gc.garbage if isinstance(x, torch.Tensor))
        gc.set_debug(0)
        gc.garbage.clear()
        self.found.append((phase, objects, tensors, seconds))


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="w0",
        eos_token="w1",
        unk_token="w2",
    )


def reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    output = parser.parse_args().output
    config = Qwen3Config(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    args = GRPOConfig(
        "outputs/memory", use_cpu=True, max_steps=12, max_completion_length=32, report_to="none", save_strategy="no",
        save_epochs=False, plot_metrics=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Measured(
        AutoModelForCausalLM.from_config(config), reward, args, Dataset.from_dict({"prompt": ["w5 " * 32] * 8}),
        processing_class=tokenizer(1024),
    )  # fmt: skip
    gc.disable()
    trainer.train()
    gc.enable()
    assert all(p.grad is None for p in trainer.model.parameters()), "zero_grad(set_to_none=True)"
    rows = {}
    for phase in ("rollout", "update"):
        later = [found for found in trainer.found if found[0] == phase][1:]  # the first call frees what start-up left
        rows[phase] = {
            "calls": len(later),
            "unreachable_objects_per_call": sum(row[1] for row in later) / len(later),
            "tensor_bytes_per_call": sum(row[2] for row in later) / len(later),
            "milliseconds_per_call": 1e3 * sum(row[3] for row in later) / len(later),
        }
    print(json.dumps(rows, indent=2))
    if output:
        with open(output, "w") as file:
            json.dump({"torch": torch.__version__, "figures": rows}, file, indent=2)


if __name__ == "__main__":
    main()
