"""What the self-test shows: a row per check, the completions with their rewards, and what to do."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..callbacks import printable
from .checks import Result
from .trial import Trial

PROMPT_END, COMPLETION = 60, 200  # characters shown


def check_table(results: Mapping[str, Result]) -> Table:
    """A row per check: ok, look (it passed, with something to look at) or fix."""
    table = Table("Check", "Result", "Detail", title="Self-test", show_lines=True)
    for name, result in results.items():
        word, style = ("look" if result.remedy else "ok", "") if result.passed else ("fix", "bold")
        table.add_row(name, Text(word, style), Text(printable(result.detail)))
    return table


def reward_table(trial: Trial) -> Table:
    """A row per completion: the end of its prompt, its beginning, each reward, and their weighted sum."""
    rows = zip(trial.rewards_per_func.tolist(), trial.rewards.tolist(), strict=True)
    table = Table("Prompt", "Completion", *map(escape, trial.trainer.reward_names), "Sum", show_lines=True)
    for group in trial.groups:
        prompt = trial.trainer.processing_class.decode(group.prompt.ids)[-PROMPT_END:]
        for completion, ended in zip(group.completions, group.terminated, strict=True):
            text = _text(completion)
            shown = text[:COMPLETION] + ("..." if len(text) > COMPLETION or not ended else "")
            values, total = next(rows)
            numbers = ["None" if value != value else f"{value:.3g}" for value in (*values, total)]
            table.add_row(Text(printable(prompt)), Text(printable(shown)), *numbers)
            prompt = ""
    return table


def verdict(results: Mapping[str, Result]) -> tuple[list[str], bool]:
    """A line for each row that is not plainly ok, then "ready" or how many there are to fix; and whether it is."""
    failed = {name: result for name, result in results.items() if not result.passed}
    looks = {name: result for name, result in results.items() if result.passed and result.remedy}
    lines = [f"Fix {name}: {result.remedy}" for name, result in failed.items()]
    lines += [f"Look at {name}: {result.remedy}" for name, result in looks.items()]
    return [*lines, f"not ready: {len(failed)} of {len(results)} checks failed" if failed else "ready"], not failed


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(str(m.get("content")) for m in completion)
