"""The whole GRPO step, side by side with TRL: rollout, rewards, reference and updates on the same load.

    python benchmarks/step_vs_trl.py
    python benchmarks/step_vs_trl.py --mu 4 --steps 3 --repeats 4 --output benchmarks/results/mu4.json

The sides alternate, and each measurement has a process of its own, so that peak memory is one side's. Read the ratios;
`benchmarks/README.md` says how.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before the Hugging Face libraries read them

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.utils.logging import disable_progress_bar

warnings.simplefilter("ignore", FutureWarning)
disable_progress_bar()

# a side is a module with GRPOTrainer and GRPOConfig -> that trainer's method which samples a rollout, prompts to text
SIDES = {"trl": "_generate", "grpo_trl": "sample"}
EXTRAS_OFF = {"trl": {}, "grpo_trl": {"plot_metrics": False, "save_epochs": False}}  # files of one side only
PAD, EOS = 0, 1
RATIOS = ("tokens_per_second", "rollout_seconds", "rest_seconds", "mean_completion_length", "peak_memory_mib")
OBJECTIVE = {"loss_type": "dapo", "scale_rewards": "group", "beta": 0.01, "use_bias_correction_kl": True}
HELD_EQUAL = (
    "weights of policy and reference, dtype, tokenizer",
    "prompts and their order, completions per prompt and per micro-batch, reward function",
    "EOS ids, temperature, longest completion (lengths differ by chance, their distribution does not)",
    f"objective ({', '.join(f'{name} {value}' for name, value in OBJECTIVE.items())}), num_iterations",
    "AdamW, learning rate; no gradient checkpointing, no autocast; no logs, plots or saved files",
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, numbers = parser.add_argument, lambda text: [int(number) for number in text.split(",")]
    add("--sides", type=lambda text: text.split(","), default=list(SIDES), help="comma-separated, in turn")
    add("--mu", type=numbers, default=[1, 4], help="num_iterations, comma-separated")
    add("--repeats", type=int, default=1, help="measurements per side and mu, each with a seed of its own")
    add("--steps", type=int, default=1, help="timed rounds (a rollout and its mu updates), after one to warm up")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", default="float32", help="of policy and reference")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=6)
    add("--vocab", type=int, default=4096)
    add("--prompts", type=int, default=4, help="prompts per rollout")
    add("--num_generations", type=int, default=8, help="completions per prompt")
    add("--prompt_length", type=numbers, default=[100, 200], help="MIN,MAX")
    add("--max_completion_length", type=int, default=128)
    add("--eos_every", type=int, default=48, help="one in so many token ids ends a completion (mean length ~45)")
    add("--output", type=Path, help="JSON; default: benchmarks/results/step_vs_trl_DEVICE.json")
    load = parser.parse_args(argv)
    if unknown := set(load.sides) - set(SIDES):
        parser.error(f"--sides got {', '.join(sorted(unknown))}; use {', '.join(SIDES)}")
    load.output = load.output or Path(__file__).parent / f"results/step_vs_trl_{load.device}.json"
    return load


def eos_ids(load: argparse.Namespace) -> list[int]:
    """Random weights sample nearly uniformly: with one EOS id in 48, lengths are nearly geometric."""
    return list(range(EOS, load.vocab, load.eos_every))


def build_prompts(load: argparse.Namespace) -> list[str]:
    """As many as the rounds take, so that no prompt comes twice."""
    rng = random.Random(0)
    words = sorted(set(range(EOS + 1, load.vocab)) - set(eos_ids(load)))
    lengths = [rng.randint(*load.prompt_length) for _ in range(load.prompts * (load.steps + 1))]
    return [" ".join(f"w{i}" for i in rng.choices(words, k=length)) for length in lengths]


def build_tokenizer(load: argparse.Namespace) -> PreTrainedTokenizerFast:
    """One word per token id, so that a prompt's text is exactly the tokens that were drawn for it."""
    vocab = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(EOS + 1, load.vocab)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def save_model(load: argparse.Namespace, folder: str) -> None:
    """A Qwen3 with random weights, and the tokenizer. Both sides load policy and reference from here."""
    heads = 2 * max(1, load.hidden // 128)
    config = Qwen3Config(
        vocab_size=load.vocab,
        hidden_size=load.hidden,
        intermediate_size=3 * load.hidden,
        num_hidden_layers=load.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = eos_ids(load)
    model.save_pretrained(folder)
    build_tokenizer(load).save_pretrained(folder)


class Clock(TrainerCallback):
    """When training began and each round ended, and the seconds and completion lengths of each rollout."""

    def __init__(self, mu: int, device: str):
        self.mu, self.device = mu, device
        self.marks, self.rollouts, self.lengths = [], [], []

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks.append(self.now())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.mu == 0:
            self.marks.append(self.now())

    def time_rollouts(self, trainer: Any, method: str) -> None:
        sample = getattr(trainer, method)

        def timed(*args, **kwargs):
            start = self.now()
            result = sample(*args, **kwargs)
            self.rollouts.append(self.now() - start)
            return result

        setattr(trainer, method, timed)

    def reward(self, completion_ids: list[list[int]], **kwargs) -> list[float]:
        """The share of even ids: costs nothing and differs within a group. Both sides give it the sampled ids."""
        self.lengths.append([len(ids) for ids in completion_ids])
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    def figures(self, load: argparse.Namespace) -> dict[str, float]:
        """Means per round, the first left out. A token counts once, however many updates are made on it."""
        counts = {len(self.marks) - 1, len(self.rollouts), len(self.lengths)}
        if counts != {load.steps + 1}:
            raise RuntimeError(
                f"expected {load.steps + 1} rounds, rollouts and reward calls, counted {counts}; fix SIDES."
            )
        seconds = (self.marks[-1] - self.marks[1]) / load.steps
        rollout = mean(self.rollouts[1:])
        lengths = [length for rows in self.lengths[1:] for length in rows]
        return {
            "tokens_per_second": sum(lengths) / load.steps / seconds,
            "round_seconds": seconds,
            "rollout_seconds": rollout,
            "rest_seconds": seconds - rollout,
            "mean_completion_length": mean(lengths),
            "share_at_max_length": mean(float(length == load.max_completion_length) for length in lengths),
        }


def measure(load: argparse.Namespace, folder: str, mu: int, seed: int, side: str) -> dict[str, Any]:
    """Trains one side; runs in a process of its own, whose peak is MiB resident (Linux) or of CUDA's allocator."""
    module, clock = importlib.import_module(side), Clock(mu, load.device)
    with tempfile.TemporaryDirectory() as output_dir:
        args = module.GRPOConfig(
            output_dir,
            per_device_train_batch_size=load.prompts * load.num_generations,
            num_generations=load.num_generations,
            num_iterations=mu,
            max_steps=(load.steps + 1) * mu,
            max_completion_length=load.max_completion_length,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            bf16=False,
            model_init_kwargs={"dtype": load.dtype},
            use_cpu=load.device == "cpu",
            seed=seed,
            shuffle_dataset=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **OBJECTIVE,
            **EXTRAS_OFF[side],
        )
        dataset = Dataset.from_dict({"prompt": build_prompts(load)})
        trainer = module.GRPOTrainer(folder, clock.reward, args, dataset, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        clock.time_rollouts(trainer, SIDES[side])
        trainer.train()
    if load.device == "cuda":
        peak, name = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.get_device_name()
    else:
        peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, platform.machine()
    figures = clock.figures(load) | {"peak_memory_mib": peak}
    return {"side": side, "mu": mu, "seed": seed, "device_name": name} | figures


def ratios(measurements: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """grpo_trl divided by trl for each mu, one number per repeat."""
    result = {}
    for mu in dict.fromkeys(row["mu"] for row in measurements):
        ours, peer = ([r for r in measurements if (r["side"], r["mu"]) == (side, mu)] for side in ("grpo_trl", "trl"))
        if ours and peer:
            pairs = list(zip(ours, peer, strict=True))
            result[f"mu {mu}"] = {name: [round(a[name] / b[name], 3) for a, b in pairs] for name in RATIOS}
    return result


def report(load: argparse.Namespace, measurements: list[dict[str, Any]]) -> dict[str, Any]:
    """What the JSON holds. The command has every setting, but no path of this machine."""
    settings = {name: value for name, value in vars(load).items() if name != "output"}
    options = [f"--{k} {','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items()]
    return {
        "command": " ".join(["python benchmarks/step_vs_trl.py", *options]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *SIDES)},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "held_equal": HELD_EQUAL,
        "measurements": measurements,
        "ratios": ratios(measurements),
    }


def show(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for mu, by_name in result["ratios"].items():
        table = Table("", "grpo_trl / trl", "lowest", "highest", title=f"{mu}: median of the repeats", min_width=60)
        for name, values in by_name.items():
            table.add_row(name, *(f"{value:.2f}" for value in (median(values), min(values), max(values))))
        console.print(table)
    console.print("held equal:", *(f"- {line}" for line in result["held_equal"]), sep="\n")


def main() -> None:
    load = parse()
    # alternating, so that a slow minute of the machine does not fall on one side
    runs = [(mu, seed, side) for mu in load.mu for seed in range(load.repeats) for side in load.sides]
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    measurements = []
    with tempfile.TemporaryDirectory() as folder, pool:
        save_model(load, folder)
        for mu, seed, side in runs:
            # a process of its own, which is what max_tasks_per_child=1 gives
            measurements.append(pool.submit(measure, load, folder, mu, seed, side).result())
            figures = {name: round(value, 2) for name, value in measurements[-1].items() if isinstance(value, float)}
            print(f"{len(measurements)}/{len(runs)} {side}, mu {mu}: {figures}", file=sys.stderr, flush=True)
    result = report(load, measurements)
    load.output.parent.mkdir(parents=True, exist_ok=True)
    load.output.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


if __name__ == "__main__":
    main()
