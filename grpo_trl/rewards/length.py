"""How long, and how repetitive, is a completion? All read token ids, so plain text and messages are alike."""

from collections.abc import Callable
from typing import Any

from trl.rewards import (
    get_repetition_penalty_reward,  # pyright: ignore[reportPrivateImportUsage]
    get_soft_overlong_punishment,  # pyright: ignore[reportPrivateImportUsage]
)


class LengthPenalty:
    """-(tokens / `max_completion_length`), from 0.0 (empty) to -1.0 (full length or more): shorter is better.

    Weigh it low beside a reward for being right, or the shortest answer wins.
    """

    __name__ = "length"

    def __init__(self, max_completion_length: int):
        self.max_completion_length = max_completion_length

    def __call__(self, /, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [-min(len(ids) / self.max_completion_length, 1.0) for ids in completion_ids]


def soft_overlong(max_completion_length: int) -> Callable[..., list[float]]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) from TRL, tied to the run's own maximum length L.

    The cache c is a fifth of L (at least one token), the paper's 4,096 of 20,480: 0.0 up to L - c tokens, then
    linear to -1.0 at L, -1.0 beyond.
    """
    reward = get_soft_overlong_punishment(max_completion_length, max(1, max_completion_length // 5))
    return _named(reward, "soft_overlong")


def repetition(max_completion_length: int) -> Callable[..., list[float]]:
    """TRL's repetition penalty (arXiv 2502.03373, appendix C.2): minus the share of repeated 3-grams of token ids."""
    return _named(get_repetition_penalty_reward(ngram_size=3, max_penalty=-1.0), "repetition")


def _named(reward: Any, name: str) -> Any:
    """The metric is called as the user asked for it: `rewards/soft_overlong/mean`."""
    reward.__name__ = name
    return reward
