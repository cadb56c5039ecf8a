"""`training_metrics.png`: how a run is going, at a glance."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import TrainerCallback

from ..disk import in_one_move

FILE_NAME = "training_metrics.png"
EVAL_REWARD = re.compile(r"eval_(?:(?P<name>.+)_)?reward")
FEW_POINTS = 40  # up to here each point is marked (a first, single one could not be seen otherwise); beyond, smoothed

History = Sequence[Mapping[str, Any]]


class MetricsPlotCallback(TrainerCallback):
    """Redraws `<output_dir>/training_metrics.png` from `state.log_history` at every log, on the main process (a third
    of a second of CPU time; raise `logging_steps` where that counts)."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_metrics(state.log_history, Path(str(args.output_dir)) / FILE_NAME, beta=getattr(args, "beta", None))


def plot_metrics(history: History, path: Path, *, beta: float | None = None) -> None:
    """Draws loss, reward, entropy, completion length, clip fraction and KL over optimizer steps as a PNG.

    Args:
        history: `TrainerState.log_history`, dicts with `step`. Metrics that are missing, None or not finite are left
            out; a panel without any says so.
        path: the file, replaced in one move, so that a viewer never reads half a picture.
        beta: weight of the KL penalty; `beta x kl` is drawn as the KL part of the loss.
    """
    # no pyplot: it would start (or fight over) the backend of the user's own figures
    figure = Figure(figsize=(13, 6.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flatten()
    last_step = max((row["step"] for row in history if "step" in row), default=0)
    figure.suptitle(f"Training metrics, step {last_step}", fontsize=13, y=0.975)
    if len(history) > FEW_POINTS:
        figure.text(0.985, 0.97, "bold: running mean", ha="right", fontsize=8, color="gray")
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.08, top=0.875, wspace=0.24, hspace=0.34)
    _draw_loss(axes[0], history, beta)
    _draw_reward(axes[1], history)
    _draw_length(axes[2], history)
    _draw_line(axes[3], history, "Entropy of the policy (nats per token)", "entropy")
    _draw_line(axes[4], history, "Clip fraction", "clip_ratio/region_mean")
    _draw_line(axes[5], history, "KL to the reference (nats per token)", "kl")
    for index, ax in enumerate(axes):
        # fixed places: looking for the best one takes longer with every point; rewards rise, so below right is free
        legend = "lower right" if index == 1 else "upper left"
        _finish(ax, x_label="optimizer step" if index >= 3 else None, x_max=last_step, legend=legend)
    with in_one_move(path) as temporary, open(temporary, "wb") as file:
        canvas.print_png(file)


def _draw_loss(ax: Axes, history: History, beta: float | None) -> None:
    ax.set_title("Loss")
    _line(ax, history, "loss", "loss", color="tab:blue")
    _line(ax, history, "policy_loss", "policy part", color="tab:orange", linestyle="--")
    if beta:
        _line(ax, history, "kl", f"KL part ({beta:g} x kl)", color="tab:green", linestyle=":", scale=beta)


def _draw_reward(ax: Axes, history: History) -> None:
    ax.set_title("Reward")
    steps, mean, std = _columns(history, "reward", "reward_std")
    if steps:
        low, high = zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True)
        ax.fill_between(steps, low, high, color="tab:blue", alpha=0.15, linewidth=0, label="± reward_std")
    _line(ax, history, "reward", "reward (mean)", color="tab:blue")
    names = dict.fromkeys(key for row in history for key in row if EVAL_REWARD.fullmatch(key))
    for name, color in zip(names, _colors(len(names)), strict=True):
        _line(ax, history, name, name, color=color, linestyle="--", marker="D", markersize=5)


def _draw_line(ax: Axes, history: History, title: str, key: str) -> None:
    ax.set_title(title)
    _line(ax, history, key, key, color="tab:blue")


def _draw_length(ax: Axes, history: History) -> None:
    ax.set_title("Completion length (tokens)")
    steps, low, high = _columns(history, "completions/min_length", "completions/max_length")
    if steps:
        ax.fill_between(steps, low, high, color="tab:blue", alpha=0.15, linewidth=0, label="min to max")
    _line(ax, history, "completions/mean_length", "mean", color="tab:blue")


def _line(ax: Axes, history: History, key: str, label: str, *, color: str, scale: float = 1.0, **style: Any) -> None:
    """One metric: its points joined; when there are many, these faintly and their running mean on top."""
    steps, values = _columns(history, key)
    values, label = [scale * value for value in values], label.replace("$", r"\$")  # no formula
    if 0 < len(steps) <= FEW_POINTS:
        ax.plot(steps, values, label=label, color=color, **{"marker": "o", "markersize": 3.5, **style})
    elif steps:
        ax.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        ax.plot(steps, _running_mean(values, len(values) // 20), label=label, color=color, **style)


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the `window` values around each: centred, so that the curve does not lag behind."""
    totals, count, half = [0.0, *accumulate(values)], len(values), window // 2
    ranges = ((max(0, i - half), min(count, i + half + 1)) for i in range(count))
    return [(totals[end] - totals[start]) / (end - start) for start, end in ranges]


def _columns(history: History, *keys: str) -> list[list[float]]:
    """Steps and one list per key, from the rows that hold a finite number for every key."""
    rows = [row for row in history if "step" in row and all(_is_number(row.get(key)) for key in keys)]
    return [[row[key] for row in rows] for key in ("step", *keys)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _colors(count: int) -> list[str]:
    colors = ["tab:red", "tab:purple", "tab:brown", "tab:olive", "tab:cyan", "tab:pink"]
    return [colors[i % len(colors)] for i in range(count)]


def _finish(ax: Axes, *, x_label: str | None, x_max: float, legend: Literal["upper left", "lower right"]) -> None:
    """Grid, ticks and legend; or the sentence that there is nothing to see."""
    ax.set_xlim(0, max(1, x_max) * 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.title.set_fontsize(11)
    if x_label:
        ax.set_xlabel(x_label)
    if not ax.has_data():
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", va="center", color="gray")
        ax.set_yticks([])
        return
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 1:
        ax.legend(handles, labels, loc=legend, fontsize=8, framealpha=0.6, borderpad=0.3)
