"""What a reward model reads of a prompt and a completion: the text forms, one BOS, the length limit."""

import re
from typing import Any

from transformers.tokenization_utils_base import BatchEncoding

from .text import Messages, completion_text, message_text

INPUT_FORMATS = ("auto", "pair", "chat", "text")

# <|im_start|> <|user|> <|turn> <turn|>, DeepSeek's with its own bars, <start_of_turn>, [INST]
_MARKUP = re.compile(r"<[|｜][\w▁/]+[|｜]?>|<[\w/]+[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")


def is_templated(prompt: Any) -> bool:
    """Whether a prompt is text that was put through a chat template: it holds a template's markup.

    The policy reads such text as it is, and so must a reward model: in a template of its own, the markup would become
    the words of a user.
    """
    return isinstance(prompt, str) and _MARKUP.search(prompt) is not None


def chat_text(tokenizer: Any, prompt: Any, completion: Any, template_kwargs: dict[str, Any]) -> str:
    """Prompt and completion through the chat template; after templated text, completion and the end of its turn."""

    def render(messages: Messages) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs))

    if not is_templated(prompt):
        question, answer = turns(prompt, completion)
        return render(question + answer)
    end_of_turn = render(_messages("QUESTION", "user") + _messages("ANSWER", "assistant")).rpartition("ANSWER")[2]
    return prompt + completion_text(completion) + end_of_turn


def encode_pair(tokenizer: Any, prompt: Any, completion: Any) -> BatchEncoding:
    """The tokenizer's text pair (question, answer); templated text, in which no question can be told, as one text."""
    if is_templated(prompt):
        return encode_text(tokenizer, prompt, completion)
    question, answer = turns(prompt, completion)
    # a limit is applied afterwards (truncate_left), so the tokenizer need not warn about it
    return tokenizer(_question(question), completion_text(answer), verbose=False)


def encode_text(tokenizer: Any, prompt: Any, completion: Any) -> BatchEncoding:
    """A text prompt directly followed by the completion, or the texts of all messages with empty lines between."""
    if isinstance(prompt, str):
        text = prompt + completion_text(completion)
        # the tokenizer writes its own
        text = text.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else text
    else:
        question, answer = turns(prompt, completion)
        text = "\n\n".join(message_text(message["content"]) for message in question + answer)
    return tokenizer(text, verbose=False)


def turns(prompt: Any, completion: Any) -> tuple[Messages, Messages]:
    """Prompt and completion as messages. An assistant message that the prompt ends with is the completion's beginning
    (the policy continued it), not a turn of its own."""
    question, answer = _messages(prompt, "user"), _messages(completion, "assistant")
    if not (question and answer and question[-1]["role"] == answer[0]["role"] == "assistant"):
        return question, answer
    *question, begun = question
    first = {**answer[0], "content": message_text(begun["content"]) + message_text(answer[0]["content"])}
    return question, [first, *answer[1:]]


def encode_with_one_bos(tokenizer: Any, text: str) -> BatchEncoding:
    """Tokenises templated text, which holds its special tokens already: one BOS if template or tokenizer has one."""
    bos = tokenizer.bos_token
    if bos:
        bare = text
        while bare.startswith(bos):
            bare = bare[len(bos) :]
        text = bos + bare if _adds_bos(tokenizer) or bare != text else text
    return tokenizer(text, add_special_tokens=False, verbose=False)


def truncate_left(encoding: BatchEncoding, max_length: int, bos_token_id: int | None = None) -> dict[str, list[int]]:
    """Drops tokens from the left of the first text, then of the second, until the row fits. Special tokens that the
    tokenizer added and a leading BOS stay."""
    ids = encoding["input_ids"]
    owners = encoding.sequence_ids(0)  # None: added by the tokenizer; 0, 1: first or second text
    excess = len(ids) - max_length
    removable = [index for owner in (0, 1) for index, of in enumerate(owners) if of == owner]
    if ids and ids[0] == bos_token_id:
        removable = [index for index in removable if index != 0]
    dropped = set(removable[: max(0, excess)])
    return {key: [v for index, v in enumerate(values) if index not in dropped] for key, values in encoding.items()}


def _adds_bos(tokenizer: Any) -> bool:
    return bool(tokenizer.bos_token) and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def _messages(value: Any, role: str) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def _question(messages: Messages) -> str:
    """System text and last user message, one empty line between."""
    by_role = {role: [m for m in messages if m["role"] == role] for role in ("system", "user")}
    chosen = by_role["system"] + by_role["user"][-1:]
    return "\n\n".join(message_text(message["content"]) for message in chosen)
