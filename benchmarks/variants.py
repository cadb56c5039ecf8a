"""The demo's task under the variants of `recipes/demo`: what each learns, and from how many tokens.

    python benchmarks/variants.py --seeds 0,1,2

Writes results/variants.md (held-out accuracy, tokens, share of groups without gradient), variants.json and
variants.png (reward against generated tokens, mean and spread over the seeds).
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import datasets
import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS

sys.path.append(str(Path(__file__).parents[1] / "recipes" / "demo"))
import demo

DEMO = Path(demo.__file__).parent
VARIANTS = ("grpo", "dapo", "dr_grpo", "gspo")
COST = "dynamic_sampling/"
TOKENS = COST + "tokens_per_trained_token"


def run(variant: str, seed: int, options: list[str]) -> dict[str, Any]:
    """One run of a recipe: accuracies, curve, cost."""
    args = demo.parse_config(["--config", str(DEMO / f"{variant}.yaml"), "--seed", str(seed), *options])
    result = demo.run(args)
    logs = [entry for entry in result.history if demo.RIGHT in entry]
    return {
        "variant": variant,
        "seed": seed,
        "before": result.before.accuracy,
        "after": result.after.accuracy,
        "seconds": result.grpo_seconds,
        "tokens": [entry["num_tokens"] for entry in logs],
        "reward": [entry[demo.RIGHT] for entry in logs],
        "without_gradient": mean(entry["frac_reward_zero_std"] for entry in logs),
        "cost": {name: mean(entry[name] for entry in logs) for name in logs[-1] if name.startswith(COST)},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row per variant, over its seeds."""
    lines = [
        "| Variant | Accuracy before | after, per seed | mean | tokens (millions) | sampled groups without gradient "
        "| completion tokens sampled per token trained |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        after = [row["after"] for row in mine]
        cells = (
            variant,
            f"{mean(row['before'] for row in mine):.1%}",
            ", ".join(f"{value:.1%}" for value in after),
            f"{mean(after):.1%}",
            f"{mean(row['tokens'][-1] for row in mine) / 1e6:.2f}",
            f"{mean(row['without_gradient'] for row in mine):.0%}",
            f"{mean(row['cost'].get(TOKENS, 1.0) for row in mine):.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of right answers against generated tokens."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        curves = [row for row in rows if row["variant"] == variant]
        points = list(zip(*(zip(row["tokens"], row["reward"], strict=True) for row in curves), strict=False))
        tokens = [mean(token for token, _ in point) / 1e6 for point in points]
        middle = [mean(reward for _, reward in point) for point in points]
        spread = [stdev([reward for _, reward in point]) if len(point) > 1 else 0.0 for point in points]
        (line,) = axis.plot(tokens, middle, label=variant)
        low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(tokens, low, high, alpha=0.2, color=line.get_color())
    axis.set_xlabel("tokens, prompts and completions, of all that was sampled (millions)")
    axis.set_ylabel("sampled answers that are right")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="recipes in recipes/demo, comma-separated")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=RESULTS / "variants.json", help="JSON; .md and .png beside it")
    known, options = parser.parse_known_args()  # what is left are fields of GRPOConfig
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    rows = []
    for seed in map(int, known.seeds.split(",")):
        for variant in known.variants.split(","):
            rows.append(run(variant, seed, options))
            known.output.write_text(json.dumps(rows, indent=2) + "\n")
    text = table(rows)
    print(text)
    command = " ".join(["python benchmarks/variants.py", f"--seeds {known.seeds}", *options])
    known.output.with_suffix(".md").write_text(f"# The demo's task under four variants\n\n`{command}`\n\n{text}\n")
    draw(rows, known.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
