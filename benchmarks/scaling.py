"""How the cost of a step grows with group, prompt, completion and model: TRL and grpo_trl, in one picture.

    python benchmarks/scaling.py

One thing changes at a time, from the load in the middle of each row. Written to results/scaling.json and scaling.png.
"""

from dataclasses import replace
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import Load, alternate, describe, loads_of, parser, report
from step_vs_trl import SIDES, measure

# what changes -> the values of one row of measurements, as fields of Load
SWEEPS: dict[str, dict[str, dict[str, Any]]] = {
    "completions per prompt": {str(group): {"group": group} for group in (2, 4, 8, 16)},
    "prompt tokens": {str(length): {"prompt_len": (length, length)} for length in (25, 100, 400, 800)},
    "longest completion": {str(length): {"completion_len": length} for length in (32, 64, 128, 256)},
    "model": {shape: {"shape": shape} for shape in ("tiny", "small")},
}
BASE = {"prompts": 4, "group": 8, "prompt_len": (150, 150), "completion_len": 64}


def draw(results: dict[str, Any], path: Any) -> None:
    """Seconds of a round against what changes, and how many times faster it is."""
    figure, axes = plt.subplots(2, len(results), figsize=(4 * len(results), 6), sharex="col", squeeze=False)
    for column, (what, points) in enumerate(results.items()):
        labels = list(points)
        top, bottom = axes[0][column], axes[1][column]
        for side in SIDES:
            top.plot(labels, [points[label][side] for label in labels], marker="o", label=side)
        bottom.plot(labels, [points[label]["ratio"] for label in labels], marker="o", color="black")
        bottom.axhline(1, color="grey", linewidth=0.8)
        top.set_yscale("log")
        bottom.set_ylim(bottom=0)
        bottom.set_xlabel(what)
    axes[0][0].set_ylabel("seconds per step")
    axes[1][0].set_ylabel("tokens/s, grpo_trl / trl")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    options = parser(__doc__ or "", "scaling.json").parse_args()
    base: Load = replace(next(iter(loads_of(options).values())), **BASE)
    results: dict[str, Any] = {}
    for what, values in SWEEPS.items():
        for label, change in values.items():
            load = replace(base, **change)
            rows = alternate(measure, load, list(SIDES), options.repeats)
            of = {side: [row for row in rows if row["side"] == side] for side in SIDES}
            speed = {side: median(row["tokens_per_second"] for row in of[side]) for side in SIDES}
            point = {side: median(row["round_seconds"] for row in of[side]) for side in SIDES}
            point |= {"ratio": speed["grpo_trl"] / speed["trl"], "load": describe(load), "measurements": rows}
            results.setdefault(what, {})[label] = point
            print(f"{what} {label}: {point['ratio']:.1f}x")
            report(options, {"sweeps": results})
    draw(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
