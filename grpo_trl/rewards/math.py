r"""Is the answer right? `accuracy` (math-verify) and `exact_match`, on plain text and on messages.

TRL's `accuracy_reward` reads LaTeX only (0 for `72` and `#### 72`) and raises on plain text; this one reads both.
"""

import logging
import re
from typing import Any

from .isolation import IsolatedFunction, RewardTimeoutError
from .math_verification import verify_answer
from .text import (
    THINK_END,
    completion_texts,
    final_answer,
    gold_answers,
    normalize_text,
    reasoned_texts,
    stated_answer,
)

logger = logging.getLogger(__name__)

PROCESS_TIMEOUT = 20.0  # seconds per answer, for what a signal does not interrupt (one long operation in C)

# a digit or a sign, or letters of which some is subtracted: "p - q", but not "Coca-Cola"
_MATHEMATICAL = re.compile(r".*[\d\\^=+*/<>]|(?=.*-)[-()\s]*[A-Za-z](?:[-()\s]+[A-Za-z])*[()\s]*\Z", re.DOTALL)


class AccuracyReward:
    r"""1.0 if the completion's answer equals the gold answer of its row, 0.0 if not, None without a gold answer.

    Gold: column `answer`, else `solution`. In both texts `final_answer` picks what counts (`<answer>`, `\boxed{}`,
    `####`), else math-verify finds the last expression. Equal text is right at once; a gold answer with a digit or a
    mathematical sign is compared by math-verify (`1,234` = `$1234`, `1/2` = `0.5`); any other by normalised text.

    math-verify runs in a process of its own (it stops itself by signals, which only a main thread receives), so any
    thread may call this. An answer that takes longer than `timeout` seconds counts 0.0 and its process is killed.
    """

    __name__ = "accuracy"
    in_process = True  # brings its own process and time-out
    by_row = True

    def __init__(self, timeout: float = PROCESS_TIMEOUT):
        self._verify = IsolatedFunction(verify_answer, name=self.__name__, timeout=timeout)

    def __call__(
        self,
        /,  # a column may be called self
        completions: list[Any],
        answer: list[Any] | None = None,
        solution: list[Any] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        golds = gold_answers(len(completions), answer, solution)
        verdicts: dict[tuple[str, str], float] = {}  # the completions of a group often give the same answer
        rewards: list[float | None] = []
        for text, gold in zip(completion_texts(completions), golds, strict=True):
            if gold is None:
                rewards.append(None)
                continue
            pair = (final_answer(gold), final_answer(text))
            if pair not in verdicts:
                verdicts[pair] = self._compare(*pair)
            rewards.append(verdicts[pair])
        return rewards

    def close(self) -> None:
        """Ends math-verify's process; a later call starts a new one."""
        self._verify.close()

    def _compare(self, gold: str, answer: str) -> float:
        if not answer:
            return 0.0
        if same_text(gold, answer):
            return 1.0
        if not _MATHEMATICAL.match(gold):
            return 0.0
        try:
            return float(self._verify(gold, answer))
        except RewardTimeoutError:
            logger.warning("math-verify took more than %g s, counted as wrong: %.200r", self._verify.timeout, answer)
            return 0.0


class ReasoningAccuracyReward(AccuracyReward):
    """`accuracy` of what follows the reasoning: 0.0 where no `</think>` ends it, whatever stands in it."""

    __name__ = "reasoning_accuracy"

    def __call__(self, /, completions: list[Any], **kwargs: Any) -> list[float | None]:
        answers = [text if THINK_END in text else "" for text in reasoned_texts(completions)]
        return super().__call__(answers, **kwargs)


def exact_match(
    completions: list[Any], answer: list[Any] | None = None, solution: list[Any] | None = None, **kwargs: Any
) -> list[float | None]:
    """1.0 if the stated answer and the gold answer are the same text (case, white space and punctuation around it
    aside), 0.0 if not, None without a gold answer (column `answer`, else `solution`)."""
    golds = gold_answers(len(completions), answer, solution)
    return [
        None if gold is None else float(same_text(final_answer(gold), final_answer(text)))
        for text, gold in zip(completion_texts(completions), golds, strict=True)
    ]


def same_text(gold: str, answer: str) -> bool:
    """Whether an answer, or what it states after "answer is", is the gold text up to normalisation."""
    gold = normalize_text(gold)
    return bool(gold) and gold in (normalize_text(answer), normalize_text(stated_answer(answer)))


# shared, so that training and evaluation use one process
accuracy = AccuracyReward()
reasoning_accuracy = ReasoningAccuracyReward()
