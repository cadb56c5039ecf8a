"""What text rewards read: the text of a completion, the answer in it, the gold answer of its row."""

import re
from typing import Any

THINK_END = "</think>"
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# GSM8K's mark is "#### 72". A Markdown heading ("#### 2. Add the clips") is none: after the hashes stands a number
# alone on its line, or the line is the last one.
_HASHES = re.compile(r"####[ \t]*(\S?[ \t]*-?\d[\d,. ]*\S?[ \t]*$|[^\n]+(?=\s*\Z))", re.MULTILINE)
_ANSWER_PHRASE = re.compile(r"answer(?:\s+is|\s*:)[\s:]*([^\n]+)", re.IGNORECASE)
_TEXT_MACRO = re.compile(r"\\text\s*\{([^{}]*)\}")
_OPTION = re.compile(r"\(([a-z])\)")


def message_text(content: Any) -> str:
    """Text of a message's `content`: a string, a list of parts (those of type "text" are joined) or None (empty)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def completion_text(completion: Any) -> str:
    """Text of one completion: the string itself, or the content of the last assistant message."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            return message_text(message.get("content"))
    return ""


def completion_texts(completions: list[Any]) -> list[str]:
    """Texts of plain and of conversational completions; of several messages (tool turns), the last assistant's."""
    return [completion_text(completion) for completion in completions]


def gold_answers(count: int, answer: list[Any] | None = None, solution: list[Any] | None = None) -> list[str | None]:
    """The gold text of `count` rows: column `answer`, else `solution`; None where both are missing or empty."""
    rows = zip(answer or [None] * count, solution or [None] * count, strict=True)
    return [_gold_text(first) or _gold_text(second) for first, second in rows]


def _gold_text(value: Any) -> str | None:
    if value is None:
        return None
    text = completion_text(value) if isinstance(value, (str, list)) else str(value)
    return text.strip() or None


def final_answer(text: str) -> str:
    r"""The part of a text that states its answer; the whole text where nothing marks one.

    Reasoning up to the last `</think>` is left out. Then the last mark of the first kind that is there counts:
    `<answer>...</answer>`, `\boxed{...}`, GSM8K's `#### ...`. A later mark replaces an earlier one, so listing
    several answers does not help.
    """
    text = text.rpartition(THINK_END)[2]
    if tagged := _ANSWER_TAG.findall(text):
        text = tagged[-1]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    if marked := _HASHES.findall(text):
        return marked[-1].strip()
    return text.strip()


def stated_answer(text: str) -> str:
    """`final_answer`, or what follows the last "answer is" / "answer:" on its line where nothing marks an answer."""
    answer = final_answer(text)
    phrases = _ANSWER_PHRASE.findall(answer)
    return phrases[-1].strip() if phrases else answer


def normalize_text(text: str) -> str:
    r"""Case, white space, emphasis, quotes and what ends a sentence do not count: ' The  **Nile**. ' -> 'the nile'.

    `\text{blue}` is blue and the option (B) is b. Other signs stay: [0, 1) is not (0, 1], 5! and .5 are not 5.
    """
    text = " ".join(_TEXT_MACRO.sub(r"\1", text).replace("**", "").casefold().split())
    text = text.rstrip(" .,;:").strip(" \"`'")
    option = _OPTION.fullmatch(text)
    return option.group(1) if option else text


def _last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}`, braces balanced."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[start:end]
    return None
