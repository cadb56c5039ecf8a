"""Does a completion have the asked form?"""

import re
from typing import Any

from trl.rewards import think_format_reward  # pyright: ignore[reportPrivateImportUsage]

from .text import as_messages, reasoned_texts

_THINK_THEN_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_format(completions: list[Any], **kwargs: Any) -> list[float]:
    """TRL's `think_format_reward`, on plain text too: 1.0 for `<think>...</think>...` from the start, else 0.0."""
    return think_format_reward(as_messages(reasoned_texts(completions)))


def answer_format(completions: list[Any], **kwargs: Any) -> list[float]:
    """1.0 for exactly `<think>...</think><answer>...</answer>` (white space around the blocks aside, each tag once,
    neither block empty), else 0.0."""
    return [float(_is_think_then_answer(text)) for text in reasoned_texts(completions)]


def _is_think_then_answer(text: str) -> bool:
    # counted first: with many tags the expression would try every pair of them
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _THINK_THEN_ANSWER.fullmatch(text)
    return match is not None and all(block.strip() for block in match.groups())
