"""The model card beside every saved model: what was trained, on what, with which objective, and whom to cite."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import get_config_model_id

from .policy import is_encoder_decoder

PLOT_NAME = "training_metrics.png"
FRAMEWORKS = ("transformers", "trl", "torch", "datasets", "accelerate")
ARXIV_ID = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")

GRPO_PAPER = "2402.03300"
# arXiv id -> BibTeX, for GRPO and the papers that rows of VARIANTS name
CITATIONS: dict[str, str] = {
    GRPO_PAPER: """@article{shao2024deepseekmath,
  title   = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
  author  = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li
             and Y. Wu and Daya Guo},
  year    = 2024,
  journal = {arXiv preprint arXiv:2402.03300},
}""",
}

TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

{{ base }} trained with GRPO (Group Relative Policy Optimization) by `grpo_trl`, objective `{{ variant }}`
({{ paper }}).

{{ usage }}

## Data

{{ data }}

## Rewards

{{ rewards }}

## Objective

{{ objective }}

## Training

{{ training }}

{{ plot }}

## Framework versions

{{ versions }}

## Citation

{{ citations }}
"""


def create_model_card(
    trainer: Any,
    model_name: str | None = None,
    dataset_name: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    folder: Path | None = None,
) -> None:
    """Writes `<folder>/README.md`, on the main process.

    Args:
        trainer: its `args` (a `GRPOConfig`), `model`, `state`, `reward_names` and `recipe` (a dict whose
            `train_datasets` or `dataset_name` are listed, or None) are used.
        model_name: title of the card. Default: the last part of `hub_model_id` or of `output_dir`.
        dataset_name: Hub id or ids of the data. Default: those of `recipe`.
        tags: further tags beside grpo_trl, grpo and the variant.
        folder: of the model that the card describes. Default: output_dir.
    """
    if not trainer.is_world_process_zero():
        return
    args = trainer.args
    folder = folder or Path(args.output_dir)
    name = model_name or (args.hub_model_id or Path(args.output_dir).absolute().name).split("/")[-1]
    base_model = get_config_model_id(trainer.model.config) or None
    if base_model and os.path.isdir(base_model):
        base_model = None  # a path of the machine that trained says nothing on the Hub
    recipe = trainer.recipe or {}
    entries = recipe.get("train_datasets") or []
    hub_datasets = [entry["path"] for entry in entries if entry["type"] == "hub"]
    hub_datasets = _listed(dataset_name or recipe.get("dataset_name")) or hub_datasets
    hub_datasets = [name for name in hub_datasets if not os.path.exists(name)]  # as for base_model
    is_adapter = hasattr(trainer.model, "peft_config")
    card_data = ModelCardData(
        base_model=base_model,
        datasets=hub_datasets or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=None if is_encoder_decoder(trainer.model) else "text-generation",
        model_name=name,
        tags=list(dict.fromkeys([*trainer._tag_names, args.variant, "reinforcement-learning", *_listed(tags)])),
    )
    weights = {name: f"{x:g}" for name, x in zip(trainer.reward_names, trainer.reward_weights, strict=True)}
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        model_name=name,
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "A local model",
        usage=_usage(args.hub_model_id, is_adapter, is_encoder_decoder(trainer.model)),
        variant=args.variant,
        paper=args.objective["paper"],
        data=_data(entries, hub_datasets) or ("Local files." if recipe.get("dataset_name") else "Given in code."),
        rewards=_table(("reward", "weight"), weights),
        objective=_table(("setting", "value"), _known(args.objective)),
        training=_table(("", ""), _training_facts(trainer)),
        plot=_plot(folder, Path(args.output_dir)),
        versions=_versions(),
        citations=_citations(args.objective["paper"]),
    )
    card.save(folder / "README.md")


@cache
def _versions() -> str:
    return "\n".join(f"- {name}: {version(name)}" for name in FRAMEWORKS)


def _plot(folder: Path, output_dir: Path) -> str:
    """A link to the plot, if there is one and the folder is output_dir or lies in it."""
    if not (output_dir / PLOT_NAME).exists() or output_dir not in (folder, folder.parent):
        return ""
    return f"![Training metrics]({Path(os.path.relpath(output_dir / PLOT_NAME, folder)).as_posix()})"


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _usage(hub_model_id: str | None, is_adapter: bool, encodes: bool) -> str:
    if hub_model_id is None:
        return ""
    code = f'from transformers import pipeline\n\ngenerate = pipeline("text-generation", model="{hub_model_id}")'
    if is_adapter or encodes:  # an adapter by PEFT: transformers reads some (DoRA) otherwise
        library, prefix = ("peft", "AutoPeftModelFor") if is_adapter else ("transformers", "AutoModelFor")
        auto_class = prefix + ("Seq2SeqLM" if encodes else "CausalLM")
        code = f"""from {library} import {auto_class}
from transformers import AutoTokenizer

model = {auto_class}.from_pretrained("{hub_model_id}")
tokenizer = AutoTokenizer.from_pretrained("{hub_model_id}")"""
    what = " (loads the base model and this adapter)" if is_adapter else ""
    return f"Use it{what}:\n\n```python\n{code}\n```"


def _data(entries: Sequence[Mapping[str, Any]], hub_datasets: Sequence[str]) -> str:
    """One line per entry; of a local path only its last part, which is all that means something elsewhere."""
    if not entries:
        return "\n".join(f"- {_dataset_link(name)}" for name in hub_datasets)
    lines = []
    for entry in entries:
        source = _dataset_link(entry["path"]) if entry["type"] == "hub" else f"`{Path(entry['path']).name}`"
        details = [f"{key} `{entry[key]}`" for key in ("input", "output", "split", "weight", "name") if entry.get(key)]
        lines.append(f"- {source} ({', '.join([entry['type'], *details])})")
    return "\n".join(lines)


def _dataset_link(name: str) -> str:
    return f"[{name}](https://huggingface.co/datasets/{name})"


def _training_facts(trainer: Any) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    rewards = [row["reward"] for row in state.log_history if row.get("reward") is not None]
    return {
        "optimizer steps": state.global_step,
        "epochs": round(state.epoch, 2) if state.epoch is not None else None,
        "completions per prompt (G)": args.num_generations,
        "passes over each rollout (mu)": args.num_iterations,
        "completions per rollout": args.generation_batch_size,
        "longest completion (tokens)": args.max_completion_length,
        "sampling temperature": args.temperature,
        "KL weight (beta)": args.beta,
        "learning rate": args.learning_rate,
        "ranks": args.world_size,
        "reward, first and last log": f"{rewards[0]:.3f}, {rewards[-1]:.3f}" if rewards else None,
    }


def _table(head: tuple[str, str], values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in _known(values).items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *rows])


def _citations(paper: str) -> str:
    """BibTeX of GRPO and of the variant's paper; a paper without an entry in CITATIONS is linked."""
    lines = []
    for arxiv_id in dict.fromkeys([GRPO_PAPER, *ARXIV_ID.findall(paper)]):
        if arxiv_id in CITATIONS:
            lines.append(f"```bibtex\n{CITATIONS[arxiv_id]}\n```")
        else:
            lines.append(f"- [arXiv {arxiv_id}](https://arxiv.org/abs/{arxiv_id})")
    return "\n\n".join(lines)
