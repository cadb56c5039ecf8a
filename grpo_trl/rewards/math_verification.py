"""What runs in the process of `accuracy`: math-verify on one gold answer and one given answer."""

import re
from functools import lru_cache

from math_verify import parse, verify

SIGNAL_TIMEOUT = 3  # seconds; math-verify's own, per parse and per comparison

_NUMBER = re.compile(r"[$€£]?\s*[-+]?\s*[$€£]?(?:\d[\d,]*|\d{1,3}(?: \d{3})+)?(?:\.\d+)?\s*[%$€£]?")
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")


def verify_answer(gold: str, answer: str) -> bool:
    """Whether two answers are mathematically equal. Main thread only (math-verify's signals): run it isolated."""
    return verify(list(_parse(gold)), list(_parse(answer)), timeout_seconds=SIGNAL_TIMEOUT)


@lru_cache(maxsize=1024)
def _parse(answer: str) -> tuple:
    """Expressions in an answer. A bare formula is boxed first: math-verify reads `2^{10}` as 2 and `(1, 2)` as 2."""
    answer = answer.replace(r"\$", "$").strip().strip("*").rstrip(".")
    if _is_formula(answer):
        parsed = parse(f"\\boxed{{{answer}}}", parsing_timeout=SIGNAL_TIMEOUT)
        if any(not isinstance(value, str) for value in parsed):
            return tuple(parsed)
    return tuple(parse(answer, parsing_timeout=SIGNAL_TIMEOUT))


def _is_formula(answer: str) -> bool:
    """One line without words which is not a plain number."""
    one_line = "\n" not in answer
    return one_line and not _NUMBER.fullmatch(answer) and not _WORD.search(_TEXT_MACRO.sub(" ", answer))
