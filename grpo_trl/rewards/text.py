"""What text rewards read: the text of a completion, the answer in it, the gold answer of its row."""

import re
from collections.abc import Callable
from decimal import Decimal
from math import isfinite, isnan
from typing import Any

# Completions are what a policy happens to write, so every search here takes time linear in their length: none starts
# again from each of many opening marks.
_THINK, THINK_END = "<think>", "</think>"
_ANSWER, _ANSWER_END = "<answer>", "</answer>"
_HASHES = "####"
_NUMBER_ALONE = re.compile(r"\S?[ \t]*-?\d[\d,. ]*\S?")  # "72", "$1,234.00", "-5%"
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")
_ANSWER_PHRASE = re.compile(r"answer(?:\s+is|\s*:)[\s:]*([^\n]+)", re.IGNORECASE)
_TEXT_MACRO = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox)\s*\{([^{}]*)\}")
_OPTION = re.compile(r"\(([a-z])\)")
_INLINE = re.compile(r"\${1,2}([^$]+)\${1,2}|\\\(([^\\]+)\\\)")  # $x$, \(x\)


Messages = list[dict[str, Any]]


def message_text(content: Any) -> str:
    """Text of a message's `content`: a string, a list of parts (those of type "text" are joined) or None (empty)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def completion_text(completion: Any) -> str:
    """Text of one completion: the string itself, or the content of the last assistant message."""
    return completion if isinstance(completion, str) else message_text(_last_answer(completion).get("content"))


def _last_answer(completion: Messages) -> dict[str, Any]:
    return next((m for m in reversed(completion) if m.get("role", "assistant") == "assistant"), {})


def completion_texts(completions: list[Any]) -> list[str]:
    """Texts of plain and of conversational completions; of several messages (tool turns), the last assistant's."""
    return [completion_text(completion) for completion in completions]


def reasoned_texts(completions: list[Any]) -> list[str]:
    """`completion_texts`, after the reasoning in its tags where a message was parsed into both."""
    return [_reasoning(completion) + completion_text(completion) for completion in completions]


def _reasoning(completion: str | Messages) -> str:
    if isinstance(completion, str):
        return ""
    answer = _last_answer(completion)
    reasoning = answer.get("reasoning_content") or answer.get("thinking")
    ended = answer.get("content") or answer.get("tool_calls")  # parsers do not say whether reasoning was cut off
    return f"{_THINK}\n{reasoning}\n" + (f"{THINK_END}\n\n" if ended else "") if reasoning else ""


def as_messages(completions: list[Any]) -> list[list[dict[str, Any]]]:
    """Plain texts as one assistant message each; messages as they are."""
    return [
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        for completion in completions
    ]


class OnMessages:
    """A reward function that can read completions only as messages, on plain text too. `name`: what it is shown as."""

    def __init__(self, func: Callable[..., Any], name: str):
        self.func = func
        self.__name__ = name

    def __call__(self, /, completions: list[Any], **kwargs: Any) -> Any:
        return self.func(completions=as_messages(completions), **kwargs)


def gold_answers(count: int, answer: list[Any] | None = None, solution: list[Any] | None = None) -> list[str | None]:
    """The gold text of `count` rows: column `answer`, else `solution`; None where both are missing or empty."""
    rows = zip(answer or [None] * count, solution or [None] * count, strict=True)
    return [_gold_text(first) or _gold_text(second) for first, second in rows]


def _gold_text(value: Any) -> str | None:
    if getattr(value, "ndim", None) == 0:  # of a dataset with_format("torch") or "numpy"
        value = value.item()
    if value is None or (isinstance(value, float) and isnan(value)):  # how a column of numbers leaves one out
        return None
    if isinstance(value, list) and not all(isinstance(message, dict) for message in value):
        raise ValueError(f"A gold answer is a text, a number or messages, got the list {value!r}; give one answer.")
    if isinstance(value, float) and isfinite(value):  # 72.0 of whole numbers with one left out, 1e-05
        value = f"{Decimal(repr(value)):f}".removesuffix(".0")
    text = completion_text(value) if isinstance(value, (str, list)) else str(value)
    return text.strip() or None


def final_answer(text: str) -> str:
    r"""The part of a text that states its answer; the whole text where nothing marks one; "" inside `<think>`.

    Reasoning up to the last `</think>` is left out; reasoning that goes on to the end has no answer. Then the last
    mark of the first kind that is there counts: `<answer>...</answer>`, `\boxed{...}`, GSM8K's `#### ...`. A later
    mark replaces an earlier one, so listing several answers does not help.
    """
    text = text.rpartition(THINK_END)[2]
    if _THINK in text:
        return ""
    tagged = _last_tagged(text)
    text = text if tagged is None else tagged
    for marked in (_last_boxed(text), _last_hashes(text)):
        if marked is not None:
            return marked.strip()
    return text.strip()


def stated_answer(text: str) -> str:
    """`final_answer`, or what follows the last "answer is" / "answer:" on its line where nothing marks an answer."""
    answer = final_answer(text)
    phrases = _ANSWER_PHRASE.findall(answer)
    return phrases[-1].strip() if phrases else answer


def normalize_text(text: str) -> str:
    r"""Case, white space, emphasis, quotes and what ends a sentence do not count: ' The  **Nile**. ' -> 'the nile'.

    `\text{blue}` is blue, `$x$` is x and the option (B) is b. Other signs stay: [0, 1) is not (0, 1], 5! and .5 are
    not 5.
    """
    text = _INLINE.sub(r"\1\2", _TEXT_MACRO.sub(r"\1", text))
    text = " ".join(text.replace("**", "").casefold().split())
    text = text.rstrip(" .,;:").strip(" \"`'")
    option = _OPTION.fullmatch(text)
    return option.group(1) if option else text


def _last_tagged(text: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`."""
    start = text.rfind(_ANSWER, 0, max(0, text.rfind(_ANSWER_END)))
    return None if start < 0 else text[start + len(_ANSWER) : text.find(_ANSWER_END, start)]


def _last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}`, braces balanced."""
    opened: list[int | None] = []  # the braces that are open: where the content of a box starts, None for others
    last = (-1, -1)
    for brace in _BRACE.finditer(text):
        if brace.group() != "}":
            opened.append(None if brace.group() == "{" else brace.end())
        elif opened and (start := opened.pop()) is not None:
            last = max(last, (start, brace.start()))
    return None if last[0] < 0 else text[slice(*last)]


def _last_hashes(text: str) -> str | None:
    """What follows GSM8K's mark, "#### 72". A Markdown heading ("#### 2. Add the clips") is none: after the hashes
    stands a number alone on its line, or the line is the last one."""
    lines = text.rstrip().split("\n")
    for number, line in reversed(list(enumerate(lines, 1))):
        _, mark, content = line.rpartition(_HASHES)
        content = content.strip()
        if mark and content and (number == len(lines) or _NUMBER_ALONE.fullmatch(content)):
            return content
    return None
