"""What the benchmarks share: loads, models, prompts, runs in processes of their own, reports."""

import argparse
import importlib
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before the Hugging Face libraries read them

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

warnings.simplefilter("ignore", FutureWarning)
disable_progress_bar()

RESULTS = Path(__file__).parent / "results"
PAD, EOS = 0, 1

# Qwen3's shape: what a name of --shape stands for
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512, "num_attention_heads": 2, "head_dim": 32},
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "vocab_size": 4096,
        "num_attention_heads": 4,
        "head_dim": 64,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "vocab_size": 151936,
        "num_attention_heads": 16,
        "head_dim": 128,
    },
}

OURS = {"plot_metrics": False, "save_epochs": False}  # of our GRPOConfig: no files that TRL does not write
OBJECTIVE = {"loss_type": "dapo", "scale_rewards": "group", "beta": 0.01, "use_bias_correction_kl": True}
HELD_EQUAL = (
    "weights of policy and reference, dtype, tokenizer",
    "prompts and their order, completions per prompt and per micro-batch, reward function",
    f"objective ({', '.join(f'{name} {value}' for name, value in OBJECTIVE.items())}), num_iterations",
    "AdamW, learning rate; no gradient checkpointing; no logs, plots or saved files",
)


@dataclass(frozen=True)
class Load:
    """What one measurement works on."""

    shape: str = "small"
    prompts: int = 8  # per rollout
    group: int = 8  # completions per prompt
    prompt_len: tuple[int, int] = (100, 200)  # shortest and longest prompt, in tokens
    completion_len: int = 128  # longest completion, in tokens
    raggedness: float = 0.625  # share of the longest completion that is missing on average; 0: all are that long
    mu: int = 1  # num_iterations
    micro_batches: int = 1  # gradient_accumulation_steps: a rollout's completions are trained on in so many parts
    device: str = "cpu"
    dtype: str = "float32"  # of the weights of policy and reference
    liger: bool = False  # use_liger_kernel
    steps: int = 2  # timed rounds (a rollout and its mu updates), after one to warm up

    def __str__(self) -> str:
        low, high = self.prompt_len
        mean = round(self.completion_len * (1 - self.raggedness))
        return (
            f"{self.prompts} prompts x {self.group}, prompts of {low}-{high} tokens, completions of {mean} on average "
            f"and {self.completion_len} at most, mu {self.mu}"
        )


# Loads with a name: (a) long prompts, ragged completions; (b) a small batch and four passes; (c) very long
# prompts; (d) nothing to share and nothing to unpad.
LOADS = {
    "a": Load(),
    "b": Load(prompts=2, group=4, mu=4, steps=8),  # so that chance matters less in its few completions
    "c": Load(prompts=4, prompt_len=(600, 600)),
    "d": Load(prompts=8, group=2, prompt_len=(8, 8), completion_len=64, raggedness=0.0),
}


def parser(description: str, output: str, *, loads: str = "a") -> argparse.ArgumentParser:
    """Options of every benchmark: named loads, and each field of `Load` to change in all of them."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    named = ", ".join(f"{name} = {load}" for name, load in LOADS.items())
    add("--load", default=loads, help=f"named loads, comma-separated: {named}")
    add("--shape", choices=SHAPES, help="of the model")
    add("--prompts", type=int, help="per rollout")
    add("--group", type=int, help="completions per prompt")
    add("--prompt-len", type=_range, help="MIN,MAX tokens, or one number")
    add("--completion-len", type=int, help="longest completion, in tokens")
    add("--raggedness", type=float, help="share of the longest completion that is missing on average")
    add("--mu", type=int, help="num_iterations")
    add("--micro-batches", type=int, help="gradient_accumulation_steps, in which a rollout is trained on")
    add("--device", choices=["cpu", "cuda"])
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights")
    add("--liger", action="store_const", const=True, help="use_liger_kernel on both sides (CUDA)")
    add("--steps", type=int, help="timed rounds, after one to warm up")
    add("--repeats", type=int, default=1, help="measurements of each side, alternating, each with a seed of its own")
    add("--output", type=Path, default=RESULTS / output, help="JSON")
    return result


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    return int(low), int(high or low)


def loads_of(options: argparse.Namespace) -> dict[str, Load]:
    """The named loads with the fields that the command line sets."""
    names = {field.name for field in fields(Load)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    return {name: replace(LOADS[name], **given) for name in options.load.split(",")}


def tolerance_of_lengths(load: Load, repeats: int) -> float:
    """How far two sides' mean lengths may be apart by chance, relatively: four standard errors, lengths being nearly
    geometric."""
    return 4 * (2 / (load.prompts * load.group * load.steps * repeats)) ** 0.5 if load.raggedness else 0.05


def eos_ids(load: Load) -> list[int]:
    """Random weights sample nearly uniformly, so with a share p of EOS ids lengths are nearly geometric, cut at the
    longest; p is such that their mean is the load's."""
    if load.raggedness == 0:
        return [EOS]
    vocabulary, wanted = SHAPES[load.shape]["vocab_size"], load.completion_len * (1 - load.raggedness)
    low, high = 1e-6, 1.0
    for _ in range(60):
        p = (low + high) / 2
        mean = (1 - (1 - p) ** load.completion_len) / p
        low, high = (p, high) if mean > wanted else (low, p)
    step = max(2, round(1 / p))
    return list(range(EOS, vocabulary, step))


def build_prompts(load: Load, rounds: int) -> list[str]:
    """As many as the rounds take, so that no prompt comes twice."""
    rng = random.Random(0)
    vocabulary = SHAPES[load.shape]["vocab_size"]
    words = sorted(set(range(EOS + 1, vocabulary)) - set(eos_ids(load)))
    lengths = [rng.randint(*load.prompt_len) for _ in range(load.prompts * rounds)]
    return [" ".join(f"w{i}" for i in rng.choices(words, k=length)) for length in lengths]


def build_tokenizer(load: Load) -> PreTrainedTokenizerFast:
    """One word per token id, so that a prompt's text is exactly the tokens that were drawn for it."""
    vocabulary = SHAPES[load.shape]["vocab_size"]
    vocab = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(EOS + 1, vocabulary)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def build_model(load: Load) -> Any:
    """A Qwen3 of the load's shape with random weights."""
    shape = SHAPES[load.shape]
    config = Qwen3Config(
        **shape,
        intermediate_size=3 * shape["hidden_size"],
        num_key_value_heads=shape["num_attention_heads"] // 2,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        dtype=load.dtype,
    )
    torch.manual_seed(0)
    with torch.device(load.device):
        model: Any = Qwen3ForCausalLM(config).to(getattr(torch, load.dtype))
    # without raggedness nothing ends a completion: one id of thousands hardly ever does
    model.generation_config.eos_token_id = eos_ids(load)
    return model


def save_model(load: Load, folder: str) -> None:
    """Model and tokenizer, from where both sides load policy and reference."""
    build_model(load).save_pretrained(folder)
    build_tokenizer(load).save_pretrained(folder)
    if load.device == "cuda":
        torch.cuda.empty_cache()  # this process keeps nothing from those that measure


def trainer_options(load: Load, seed: int) -> dict[str, Any]:
    """Arguments of either side's GRPOConfig: ours takes TRL's names."""
    return {
        "per_device_train_batch_size": load.prompts * load.group // load.micro_batches,
        "gradient_accumulation_steps": load.micro_batches,
        "num_generations": load.group,
        "num_iterations": load.mu,
        "max_steps": (load.steps + 1) * load.mu,
        "max_completion_length": load.completion_len,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "bf16": load.device == "cuda",
        "model_init_kwargs": {"dtype": load.dtype},
        "use_cpu": load.device == "cpu",
        "use_liger_kernel": load.liger,
        "seed": seed,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **OBJECTIVE,
    }


def copy_bandwidth() -> float:
    """Bytes per second that a CUDA device moves in a copy, each byte read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def matrix_rate() -> float:
    """FLOP per second of a CUDA device in a product of bf16 matrices."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b)


def _seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def body_parameters(shape: dict[str, int]) -> int:
    """Weights of the layers' products, embeddings and head left out."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    attention = hidden * shape["head_dim"] * (2 * heads + 2 * (heads // 2))  # q, o; k, v of half as many heads
    return shape["num_hidden_layers"] * (attention + 3 * hidden * 3 * hidden)


def peak_memory(device: str) -> float:
    """MiB: of the process (Linux), libraries included, or of CUDA's allocator."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def alternate(
    measure: Callable[..., dict[str, Any]],
    load: Any,
    sides: Sequence[str],
    repeats: int,
    save: Callable[[Any, str], None] = save_model,
) -> list[dict[str, Any]]:
    """`measure(load, folder, seed, side)` of each side in turn, so that a slow minute of the machine does not fall on
    one of them; each in a process of its own, so that peak memory is one side's. `save` fills the folder."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    rows = []
    with tempfile.TemporaryDirectory() as folder, pool:
        save(load, folder)
        for seed in range(repeats):
            for side in sides:
                row = pool.submit(measure, load, folder, seed, side).result()
                rows.append({"side": side, "seed": seed} | row)
                figures = {name: round(value, 3) for name, value in row.items() if isinstance(value, float)}
                print(f"{len(rows)}/{repeats * len(sides)} {side}: {figures}", file=sys.stderr, flush=True)
    return rows


def ratios(rows: list[dict[str, Any]], ours: str, peer: str, names: Sequence[str]) -> dict[str, list[float]]:
    """Ours divided by the peer's, one number per repeat."""
    pairs = list(zip(*([row for row in rows if row["side"] == side] for side in (ours, peer)), strict=True))
    return {name: [round(a[name] / b[name], 3) for a, b in pairs] for name in names}


def check_same_work(rows: list[dict[str, Any]], name: str, tolerance: float, rounding: float = 0.0) -> None:
    """Raises when a figure that must be equal on all sides differs by more than the tolerance, relatively, and by more
    than rounding, absolutely."""
    means = {side: mean(row[name] for row in rows if row["side"] == side) for side in {row["side"] for row in rows}}
    low, high = min(means.values()), max(means.values())
    if high - low > max(rounding, tolerance * max(abs(high), abs(low))):
        raise RuntimeError(f"The sides did not do the same work: {name} {means} differ by more than {tolerance:.0%}.")


VERSIONS = ("torch", "transformers", "trl", "grpo_trl")


def report(options: argparse.Namespace, results: dict[str, Any], held_equal: Sequence[str] = HELD_EQUAL) -> None:
    """Writes the JSON: the command with every setting that was given, versions, device, results. No path of this
    machine."""
    unset = (None, False)
    given = {k: v for k, v in vars(options).items() if k != "output" and not any(v is value for value in unset)}
    text = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in given.items()}
    words = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in text.items()]
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    on_cuda = getattr(options, "device", None) == "cuda"
    result = {
        "command": " ".join(["python", script, *words]),
        "versions": {name: importlib.import_module(name).__version__ for name in VERSIONS},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "held_equal": held_equal,
        **results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def now(device: str) -> float:
    """Seconds of a clock, after all that the device was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(title: str, by_name: dict[str, list[float]], sides: str = "grpo_trl / trl") -> None:
    """A table of ratios: median of the repeats, lowest, highest."""
    table = Table("", sides, "lowest", "highest", title=title, min_width=60)
    for name, values in by_name.items():
        table.add_row(name, *(f"{value:.2f}" for value in (median(values), min(values), max(values))))
    Console(highlight=False).print(table)


def describe(load: Load) -> dict[str, Any]:
    """A load as JSON holds it."""
    return asdict(load) | SHAPES[load.shape]


def module_of(side: str) -> Any:
    """The package with GRPOTrainer and GRPOConfig."""
    return importlib.import_module(side)
