"""What runs in the process of `accuracy`: math-verify on one gold answer and one given answer."""

import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from sympy import Basic, Equality
from sympy.core.function import AppliedUndef

SIGNAL_TIMEOUT = 3  # seconds; math-verify's own, per parse and per comparison

# "3,5" is none but a list
_NUMBER = re.compile(r"[$€£]?\s*[-+]?(?:\d+|\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+)?(?:\.\d+)?\s*[%$€£]?")
_SIGN = re.compile(r"^([$€£]?)\s*([-+])\s*(?:[$€£]\s*)?(?=[\d.])")  # math-verify loses that of "- 5" and of "-$5"
# no point, interval or set: "(3,125)"
_LIST = re.compile(r"[-\d\s.,;]*")  # of numbers alone
_THOUSANDS = re.compile(r"(?<![\d,(\[])(?<!\\\{)\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])")
# math-verify reads "2(26)" as 2 + 26; but the 2 of "\log_2(8)" and "\sin^2(3)" is no factor
_FACTOR = re.compile(r"(?<=[\d)])(?<![_^]\d)\s*(?=\(\s*[\d.]+\s*\))")
_NUMBER_AS_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox)\s*\{(\s*[-$]?\d[^{}]*)\}")
_MACRO = re.compile(r"\\(?:text|mathrm|mbox|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
# letters between spaces and the marks of a text, or many: "xy" in "2xy + 3" is a product
_WORD = re.compile(r"""(?<![^\s("'])[A-Za-z]{2,}(?![^\s,.:;!?'")])|[A-Za-z]{4,}""")
_OR = re.compile(r",?\s*(?:\\text\s*\{\s*(?:or|and)\s*\}|\b(?:or|and)\b)\s*")  # "71 or 72" is a list
_UNIT = re.compile(r"(?<=\d)\s+[A-Za-z]{2}[A-Za-z/ ]*$")  # "72 clips", "72 km/h"
_POWER = r"(?:\^\{?\d\}?)?"
_ATTACHED_UNIT = re.compile(  # "25cm^2", "12\\,cm", "30/hr"
    rf"(?<=[\d}}%])(?:\s|\\[,; ]|~)*(?:[A-Za-z]{{2,}}{_POWER})?(?:/[A-Za-z]+{_POWER})?$"
)


def verify_answer(gold: str, answer: str) -> bool:
    """Whether two answers are mathematically equal. Main thread only (math-verify's signals): run it isolated.

    An answer that calls two different numbers equal (`71 = 72`) is wrong, whatever it ends with.
    """
    # letters are symbols where the gold answer has some; else they are words and units ("25cm^2" is 25)
    symbols = re.search("[A-Za-z]", _MACRO.sub(" ", _OR.sub(", ", gold))) is not None
    expected, given = _parse(gold, symbols), _parse(answer, symbols)
    # to two decimals, as 10/3 = 3.33 is fine; whole numbers and fractions are compared exactly
    consistent = all(_equal([left], [right], float_rounding=2) for left, right in _equations(given))
    return consistent and _equal(expected, given)


def _equal(gold: Any, answer: Any, **options: Any) -> bool:
    return verify(list(gold), list(answer), timeout_seconds=SIGNAL_TIMEOUT, **options)


def _equations(parsed: tuple) -> list[Any]:
    """Both sides of each equation between numbers: `1 = 2 = 72` has two, `x = 72` and `f(2) = 72` have none."""
    equations = {eq.args for value in parsed if isinstance(value, Basic) for eq in value.atoms(Equality)}
    return [sides for sides in equations if not any(side.free_symbols or side.has(AppliedUndef) for side in sides)]


@lru_cache(maxsize=1024)
def _parse(answer: str, symbols: bool) -> tuple:
    """Expressions in an answer. A bare formula is boxed first: math-verify reads `2^{10}` as 2 and `(1, 2)` as 2."""
    answer = answer.replace(r"\$", "$").replace("\N{MINUS SIGN}", "-").strip().strip("*").rstrip(".")
    answer = _SIGN.sub(r"\1\2", _NUMBER_AS_TEXT.sub(r"\1", answer).strip()).removeprefix("+")
    formula = _formula(answer, symbols)
    if formula:
        parsed = parse(f"\\boxed{{{formula}}}", parsing_timeout=SIGNAL_TIMEOUT)
        if any(not isinstance(value, str) for value in parsed):
            return tuple(parsed)
    return tuple(parse(answer, parsing_timeout=SIGNAL_TIMEOUT))


def _joined(number: re.Match[str]) -> str:
    """`1,500` as 1500, but not the members of a list, a point, an interval or a set."""
    before = number.string[: number.start()].rstrip()
    if number.group().startswith("0") or before.endswith(("(", "[", r"\{", ",", ";", r"\langle")):
        return number.group()
    return re.sub("[{},]", "", number.group())


def _formula(answer: str, symbols: bool) -> str | None:
    """An answer of one line without words which is not a plain number. `71 or 72 clips` is one too: `71, 72`."""
    formula = _UNIT.sub("", _OR.sub(", ", answer))
    formula = formula if symbols else _ATTACHED_UNIT.sub("", formula)
    if "\n" in answer or _NUMBER.fullmatch(formula) or _WORD.search(_MACRO.sub(" ", formula)):
        return None
    if not _LIST.fullmatch(formula):  # alone, "1,000" is a number for math-verify, and in a formula a list
        formula = _THOUSANDS.sub(_joined, formula)
    return _FACTOR.sub(r"\\cdot ", formula)
