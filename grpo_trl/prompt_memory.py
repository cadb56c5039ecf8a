"""Prompt memory: how each prompt has fared over the run, and which prompts to pass over because of it.

A prompt is known by a hash of its token ids, what the policy sees of it: the same for rows of a dataset, for a stream,
and for a row that occurs twice. Every rank holds the same memory, so every rank passes over the same prompts.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

from .batch import Group, Prompt


@dataclass(frozen=True)
class PromptRecord:
    """What became of one prompt so far."""

    prompt: str  # text; a conversation as JSON
    draws: int = 0
    completions: int = 0  # that a reward applied to
    passed: int = 0
    solved_streak: int = 0  # last draws in a row of which every completion passed
    hopeless_streak: int = 0  # ... and of which none did
    last_step: int = 0  # optimizer steps made before the last draw


@dataclass(frozen=True)
class Outcome:
    """One draw of a prompt, as ranks tell each other. `prompt` is None where every rank knows it."""

    draw: int
    key: str
    prompt: str | None
    completions: int
    passed: int


class PromptMemory:
    """The records of all prompts drawn, in the order of their first draws.

    Args:
        skip_solved_after: draws in a row, every completion passed, after which a prompt is passed over; None: never.
        skip_hopeless_after: the same for draws with no completion passed.
    """

    def __init__(self, *, skip_solved_after: int | None = None, skip_hopeless_after: int | None = None):
        self.skip_solved_after, self.skip_hopeless_after = skip_solved_after, skip_hopeless_after
        self.records: dict[str, PromptRecord] = {}

    @property
    def can_skip(self) -> bool:
        """Whether prompts may be passed over at all."""
        return self.skip_solved_after is not None or self.skip_hopeless_after is not None

    @property
    def num_skipped(self) -> int:
        """Prompts that are passed over at present."""
        return sum(map(self._is_skipped, self.records.values()))

    def skips(self, prompt: Prompt) -> bool:
        """Whether to pass over this prompt."""
        record = self.records.get(key_of(prompt))
        return record is not None and self._is_skipped(record)

    def update(
        self,
        groups: Sequence[Group],
        verdicts: Sequence[Sequence[float]],
        step: int,
        gather: Callable[[list[Any]], list[Any]],
    ) -> None:
        """Counts a rollout, each draw once, in the order of the draws over all ranks.

        Args:
            groups: those of this rank.
            verdicts: one per completion of each group: 1 passed, 0 did not, NaN is not counted (`algorithm.passed`).
            step: optimizer steps made so far.
            gather: concatenates lists over ranks; every rank calls it equally often.
        """
        outcomes = [self._outcome(group.prompt, row) for group, row in zip(groups, verdicts, strict=True)]
        for outcome in sorted(gather(outcomes), key=lambda outcome: outcome.draw):
            record = self.records.get(outcome.key, PromptRecord(outcome.prompt or ""))
            solved = outcome.completions > 0 and outcome.passed == outcome.completions
            hopeless = outcome.completions > 0 and outcome.passed == 0
            self.records[outcome.key] = PromptRecord(
                record.prompt,
                draws=record.draws + 1,
                completions=record.completions + outcome.completions,
                passed=record.passed + outcome.passed,
                solved_streak=record.solved_streak + 1 if solved else 0,
                hopeless_streak=record.hopeless_streak + 1 if hopeless else 0,
                last_step=step,
            )

    def table(self) -> dict[str, list[Any]]:
        """Columns, one row per prompt: its whole state, and `pass_rate` (None: no reward ever applied)."""
        records = self.records.values()
        columns = {field.name: [getattr(record, field.name) for record in records] for field in fields(PromptRecord)}
        columns["pass_rate"] = [
            record.passed / record.completions if record.completions else None for record in records
        ]
        return columns | {"key": list(self.records)}

    def load_table(self, table: dict[str, list[Any]]) -> None:
        """Restores what `table` returned."""
        columns = [table[field.name] for field in fields(PromptRecord)]
        self.records = {key: PromptRecord(*values) for key, *values in zip(table["key"], *columns, strict=True)}

    def _outcome(self, prompt: Prompt, verdicts: Sequence[float]) -> Outcome:
        key = key_of(prompt)
        text = None if key in self.records else _readable(prompt.example["prompt"])
        judged = [verdict for verdict in verdicts if verdict == verdict]  # not NaN
        return Outcome(prompt.draw, key, text, len(judged), sum(map(int, judged)))

    def _is_skipped(self, record: PromptRecord) -> bool:
        return _reached(record.solved_streak, self.skip_solved_after) or _reached(
            record.hopeless_streak, self.skip_hopeless_after
        )


def key_of(prompt: Prompt) -> str:
    """A hash of the prompt's token ids: 16 hexadecimal digits, the same on every machine."""
    return blake2b(json.dumps(prompt.ids).encode(), digest_size=8).hexdigest()


def _reached(streak: int, limit: int | None) -> bool:
    return limit is not None and streak >= limit


def _readable(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str)
