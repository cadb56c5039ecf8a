"""One run with a reference and a reward model, by phase: seconds, peak memory, and what `grpo-trl plan` says of it.

    python benchmarks/by_phase.py --device cuda --shape qwen3-0.6b --reward deberta-v3-large --prompts 2 \
        --prompt-len 256 --completion-len 1024 --steps 20 --runs plain,checkpointing,sequential

Seconds are those of a rollout and its updates. The first, which compiles and captures, is left out of them and not of
the memory, which only CUDA counts. Random weights.
"""

import gc
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    OURS,
    SHAPES,
    Load,
    build_prompts,
    build_tokenizer,
    describe,
    loads_of,
    now,
    parser,
    peak_memory,
    report,
    save_model,
    trainer_options,
)
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, PrinterCallback, TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.memory import PolicySpec, Run, plan_run

REWARDS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
    "deberta-v3-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
# of the trainer's methods, the phase that each is
PHASES = {
    "sample": "rollout",
    "score": "waiting for rewards",
    "_old_per_token_logps": "old",
    "_reference_logps": "reference",
    "training_step": "update",
}
# a name of --runs -> arguments of GRPOConfig
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "sequential": {"reward_overlap": False},  # rewards after the rollout, not during it
}
# the plan's phase -> those measured
OF_PLAN = {
    "rollout": ("rollout", "waiting for rewards"),
    "scoring": ("old", "reference"),
    "update": ("update", "optimizer"),
}


class Phases(TrainerCallback):
    """Seconds of each phase in each optimizer step, and the highest memory of each phase in MiB."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: list[dict[str, float]] = []
        self.memory: dict[str, float] = defaultdict(float)
        self.lengths: list[list[int]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = now(self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        self._spent[name] += now(self.device) - start
        if self.device == "cuda":
            self.memory[name] = max(self.memory[name], peak_memory(self.device))

    def watch(self, trainer: GRPOTrainer) -> None:
        """Takes the time of the trainer's methods, and the lengths that it samples."""
        for method, name in PHASES.items():
            setattr(trainer, method, self._timed(getattr(trainer, method), name))
        trainer.add_callback(self)

    def _timed(self, call: Any, name: str) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                result = call(*args, **kwargs)
            if name == "rollout":
                self.lengths.append([len(ids) for group in result for ids in group.completion_ids])
            return result

        return timed

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin_step()

    def _begin_step(self) -> None:
        self._spent, self._began = defaultdict(float), now(self.device)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._optimizer = self.phase("optimizer")
        self._optimizer.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._optimizer.__exit__(None, None, None)

    def on_step_end(self, args, state, control, **kwargs):
        step = now(self.device) - self._began
        self.seconds.append({**self._spent, "the rest": step - sum(self._spent.values()), "all": step})
        self._begin_step()

    def figures(self, mu: int) -> dict[str, Any]:
        """Per rollout and its `mu` updates, the first left out: medians of the seconds."""
        names = dict.fromkeys(name for step in self.seconds for name in step)
        parts = [self.seconds[start : start + mu] for start in range(mu, len(self.seconds), mu)]
        rounds = [{name: sum(step.get(name, 0.0) for step in part) for name in names} for part in parts]
        tokens = [sum(lengths) for lengths in self.lengths[1:]]
        return {
            "seconds": {name: median(seconds[name] for seconds in rounds) for name in rounds[0]},
            "peak_mib": dict(self.memory),
            "tokens_per_second": sum(tokens) / sum(seconds["all"] for seconds in rounds),
            "tokens_per_rollout": sum(tokens) / len(rounds),
        }


def save_reward_model(shape: str, load: Load, folder: str) -> None:
    """DeBERTa-v2 with one label and the policy's words."""
    vocabulary = SHAPES[load.shape]["vocab_size"]
    config = DebertaV2Config(
        **REWARDS[shape],
        vocab_size=vocabulary,
        num_labels=1,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(load.device):
        model = DebertaV2ForSequenceClassification(config)
    model.save_pretrained(folder)
    build_tokenizer(load).save_pretrained(folder)


def measure(load: Load, policy: str, judge: str, extras: dict[str, Any]) -> dict[str, Any]:
    """Plans the run, trains it, and says what both say."""
    options = trainer_options(load, seed=0) | OURS | {"max_prompt_length": load.prompt_len[1]} | extras
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(folder, **options)
        (plan,) = plan_run(Run(PolicySpec(policy), (judge,), args)).devices.values()
        dataset = Dataset.from_dict({"prompt": build_prompts(load, load.steps + 1)})
        trainer = GRPOTrainer(policy, judge, args, dataset)
        trainer.remove_callback(PrinterCallback)
        phases = Phases(load.device)
        phases.watch(trainer)
        trainer.train()
    return phases.figures(load.mu) | {"planned_mib": {name: size / 2**20 for name, size in plan.phases.items()}}


def measure_all(load: Load, reward: str, runs: Sequence[str]) -> dict[str, Any]:
    """One run after the other, on the same models."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        policy, judge = (str(Path(folder, name)) for name in ("policy", "reward"))
        save_model(load, policy)
        save_reward_model(reward, load, judge)
        for name in runs:
            gc.collect()  # what the run before has left
            if load.device == "cuda":
                torch.cuda.empty_cache()
            results[name] = measure(load, policy, judge, RUNS[name])
            show(name, results[name])
    return results


def show(name: str, figures: dict[str, Any]) -> None:
    """Seconds and memory by phase."""
    console = Console(highlight=False)
    table = Table("phase", "seconds", "peak, MiB", title=name)
    for phase, seconds in figures["seconds"].items():
        memory = figures["peak_mib"].get(phase)
        table.add_row(phase, f"{seconds:.3f}", "" if memory is None else f"{memory:,.0f}")
    console.print(table)
    for phase, planned in figures["planned_mib"].items() if figures["peak_mib"] else ():
        found = [figures["peak_mib"][part] for part in OF_PLAN[phase] if part in figures["peak_mib"]]
        console.print(f"{phase}: planned {planned:,.0f} MiB, measured {max(found):,.0f}, {planned / max(found):.2f}")
    console.print(
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['tokens_per_rollout']:,.0f} tokens a rollout"
    )


def main() -> None:
    options = parser(__doc__ or "", "by_phase.json")
    options.add_argument("--reward", choices=REWARDS, default="tiny", help="shape of the reward model")
    options.add_argument("--runs", default="plain", help=f"comma-separated: {', '.join(RUNS)}")
    options = options.parse_args()
    results = {}
    for name, load in loads_of(options).items():
        results[name] = {"load": describe(load), "runs": measure_all(load, options.reward, options.runs.split(","))}
        report(options, {"loads": results}, held_equal=())


if __name__ == "__main__":
    main()
