"""Prompts: what a value must be, its token ids with exactly one BOS, the length limit, the order of an epoch."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]


def encode_prompt(
    example: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_format: str = "auto",
    system_prompt: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], str | Messages]:
    """Token ids (P,) of `example["prompt"]`, and the prompt as rewards see it: text, or messages with the system one.

    prompt_format (for text; messages always go through the chat template): `auto` keeps text as it is unless there is
    a system prompt, `chat` makes it a user message, `text` keeps it. system_prompt goes before conversations that
    have no system message. A conversation that ends with an assistant message is continued, any other is answered.
    A row's own `chat_template_kwargs` win over the argument's.

    What a tokenizer puts before each text by itself, as a BOS, stands there exactly once in each form, whether the
    text or the template brings it or not (huggingface/trl#3520); one that puts nothing gets nothing. EOS is never
    added.
    Raises ValueError for an empty prompt, a value that is neither text nor messages, or a chat template that is
    missing or refuses the messages.
    """
    prompt: Any = example.get("prompt")
    if problem := prompt_problem(prompt):
        raise ValueError(f"Cannot encode the prompt {prompt!r:.200}: {problem}.")
    if isinstance(prompt, str) and (prompt_format == "chat" or (prompt_format == "auto" and system_prompt)):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        if system_prompt:
            raise ValueError(
                "system_prompt needs a chat template, but prompt_format='text' keeps text prompts out of it; "
                "use prompt_format='chat' (or 'auto'), or write the system text into the prompts."
            )
        text = prompt
    else:
        prompt = _with_system(_without_fillers(prompt), system_prompt)
        text = _render(prompt, tokenizer, {**(chat_template_kwargs or {}), **_row_kwargs(example)})
    ids = _begun_once(cast(list[int], tokenizer.encode(text, add_special_tokens=False)), beginning(tokenizer))
    if not ids:
        raise ValueError(f"The prompt {prompt!r:.200} has no tokens; drop this row or give it text.")
    return ids, prompt


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    if not tokenizer.chat_template:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"The prompt is a conversation, but the tokenizer {name!r} has no chat template. Use an instruct model's "
            "tokenizer, set tokenizer.chat_template (trl.clone_chat_template copies one), or give text prompts "
            "without system_prompt and with prompt_format='text'."
        )
    continued = messages[-1]["role"] == "assistant"
    options: dict[str, Any] = {"add_generation_prompt": not continued, "continue_final_message": continued, **kwargs}
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError) as error:  # the latter where a last message to continue is not in the text
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"The tokenizer's chat template refuses the prompt {messages!r:.200} (roles: {roles}): {error}. Change "
            "the messages (a system message that it does not know may go into the first user message), or set "
            "another tokenizer.chat_template."
        ) from error


def _with_system(messages: Messages, system_prompt: str | None) -> Messages:
    if not system_prompt or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _without_fillers(messages: Messages) -> Messages:
    # Arrow gives each message, and each tool call's arguments, the keys of all, filled with None; templates test
    # `'tool_calls' in message`
    return [
        {k: v if k == "content" else _without_none(v) for k, v in message.items() if v is not None or k == "content"}
        for message in messages
    ]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _row_kwargs(example: dict[str, Any]) -> dict[str, Any]:
    kwargs = example.get("chat_template_kwargs") or {}
    if problem := template_kwargs_problem(kwargs):
        raise ValueError(f"A row's chat_template_kwargs: {problem}.")
    return _without_none(kwargs)  # filled in by Arrow, as above


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before each text: a BOS, nothing, or other tokens (GLM's [gMASK]<sop>)."""
    bare, whole = (cast(list[int], tokenizer.encode("a", add_special_tokens=flag)) for flag in (False, True))
    if not bare:  # of a vocabulary without letters: what is there is special
        return [token for token in whole if token != tokenizer.eos_token_id]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]


def ending(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts after each text: an EOS (T5), or nothing."""
    bare, whole = (cast(list[int], tokenizer.encode("a", add_special_tokens=flag)) for flag in (False, True))
    return whole[len(beginning(tokenizer)) + len(bare) :]


def _begun_once(ids: list[int], begin: list[int]) -> list[int]:
    start = 0
    while start < len(ids) and ids[start] in begin:
        start += 1
    return [*begin, *ids[start:]] if ids else []


def prompt_problem(value: Any) -> str | None:
    """What keeps `value` from being a prompt (None: nothing): it must be text or {role, content} messages."""
    if value is None:
        return "missing or null, expected text or a list of messages"
    if isinstance(value, str):
        return None if value.strip() else "empty text"
    if not isinstance(value, list):
        return f"a value of type {type(value).__name__}, expected text or a list of {{role, content}} messages"
    if not value:
        return "an empty list of messages"
    return next((problem for problem in map(_message_problem, value) if problem), None)


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return f"a list with {message!r:.80}, expected {{role, content}} messages"
    if not isinstance(message["role"], str):
        return f"a message whose role is {message['role']!r:.80}, expected text such as 'user'"
    if not isinstance(message["content"], str) and not message.get("tool_calls"):
        found = type(message["content"]).__name__
        return f"a message whose content is of type {found}, expected text; join the text of its parts, if it has any"
    return None


def template_kwargs_problem(value: Any) -> str | None:
    """What keeps `value` from being a row's `chat_template_kwargs` (None: nothing): it must be a mapping or None."""
    if value is None or isinstance(value, dict):
        return None
    return f"the {type(value).__name__} {value!r:.80}, expected a mapping such as {{enable_thinking: false}}"


def column_batches(dataset: Dataset, column: str) -> Iterator[list[Any]]:
    """The values of one column as Python objects, 1000 at a time; no other column is decoded."""
    for batch in dataset.with_format(None).select_columns([column]).iter(1000):
        yield cast(dict[str, Any], batch)[column]


def row_problems(batches: Iterable[Sequence[Any]], problem_of: Callable[[Any], str | None]) -> list[tuple[int, str]]:
    """(row from 0, problem) of each value in the batches of a column with which `problem_of` finds one."""
    values = (value for batch in batches for value in batch)
    return [(row, problem) for row, value in enumerate(values) if (problem := problem_of(value))]


def check_prompt_dataset(dataset: Any, *, where: str) -> None:
    """Checks a dataset object that the user brought: it has rows, and a `prompt` column of text or messages.

    Accepts `datasets.Dataset` and lists of rows (all prompts are checked), `IterableDataset` and other objects with
    `__getitem__` and `__len__` (the first row is). Raises TypeError or ValueError that name `where`.
    """
    if isinstance(dataset, Mapping):  # DatasetDict and IterableDatasetDict are dicts
        splits = ", ".join(map(str, dataset))
        raise TypeError(f"{where} is a dictionary of datasets ({splits}); pass one of them, such as dataset['train'].")
    is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not isinstance(dataset, IterableDataset) and not is_map_style:
        raise TypeError(
            f"{where} must be a datasets.Dataset or IterableDataset (or have __getitem__ and __len__), "
            f"got {type(dataset).__name__}."
        )
    first = _first_row(dataset)
    if first is None:
        raise ValueError(f"{where} has no rows (or, of a stream with max_prompt_length, none that is short enough).")
    if not isinstance(first, Mapping):
        raise TypeError(f"{where}: rows must be dicts with a 'prompt', got {type(first).__name__}.")
    if isinstance(dataset, list | tuple):
        for number, row in enumerate(dataset, 1):
            if not isinstance(row, Mapping):
                raise TypeError(f"{where}, row {number}: expected a dict with a 'prompt', got {type(row).__name__}.")
    if "prompt" not in first:
        raise ValueError(
            f"{where} has no 'prompt' column; its columns are {', '.join(map(str, first))}. "
            "Rename the right one with dataset.rename_column(name, 'prompt')."
        )
    _check_values(_values(dataset, "prompt") or [[first["prompt"]]], "prompt", prompt_problem, where=f"{where}, ")


def check_template_kwargs(dataset: Any) -> None:
    """Raises ValueError for a value of a `Dataset`'s or list's column `chat_template_kwargs` that is no mapping."""
    column = "chat_template_kwargs"
    _check_values(_values(dataset, column), column, template_kwargs_problem)


def first_rows(dataset: Any) -> list[dict[str, Any]]:
    """The first row of a checked dataset and, of a `Dataset` or list, the first whose prompt is of the other kind:
    text or messages."""
    first = _first_row(dataset)
    is_text = isinstance(first["prompt"], str)
    prompts = (value for batch in _values(dataset, "prompt") for value in batch)
    other = next((index for index, value in enumerate(prompts) if isinstance(value, str) != is_text), None)
    return [first] if other is None else [first, dataset[other]]


def _first_row(dataset: Any) -> Any:
    """None without rows."""
    if isinstance(dataset, IterableDataset):
        return next(iter(dataset), None)
    return dataset[0] if len(dataset) else None


def _check_values(
    batches: Iterable[Sequence[Any]], column: str, problem_of: Callable[[Any], str | None], where: str = ""
) -> None:
    if problems := row_problems(batches, problem_of):
        row, problem = problems[0]
        raise ValueError(f"{where}row {row + 1}, column {column!r}: {problem} ({len(problems)} such rows).")


def _values(dataset: Any, column: str) -> Iterable[Sequence[Any]]:
    """The values of a column of a `Dataset` or a list, in batches, None where a row lacks it. Nothing where they would
    cost more: a stream, an object of another class, a custom transform (which may need other columns)."""
    if isinstance(dataset, list | tuple):
        return [[row.get(column) for row in dataset]]
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom" or column not in dataset.column_names:
        return []
    return column_batches(dataset, column)


def truncate_prompt(ids: list[int], max_prompt_length: int, begin: list[int]) -> list[int]:
    """The last `max_prompt_length` tokens of `ids` (P,); what they all begin with (`beginning`) stays and counts."""
    if len(ids) <= max_prompt_length:
        return ids
    head = begin[:max_prompt_length] if ids[: len(begin)] == begin else []
    return head + ids[len(ids) - (max_prompt_length - len(head)) :]


def limit_prompts(
    dataset: Dataset | IterableDataset | Sequence,
    length_of: Callable[[dict[str, Any]], int],
    *,
    max_prompt_length: int | None,
    overlong_prompts: str = "drop",
    where: str = "dataset",
) -> Any:
    """Applies `overlong_prompts` to a dataset, which messages call `where`; returns what is left of it.

    length_of: row -> prompt length in tokens. `drop` removes the overlong rows, `error` raises ValueError with the
    first of them, `truncate` only counts them: `truncate_prompt` cuts when a prompt is encoded.
    Map-style datasets are scanned before training and the count is logged. A streamed one is filtered on the fly.
    Nothing happens if `max_prompt_length` is None.
    """
    if max_prompt_length is None:
        return dataset
    limit = max_prompt_length
    if isinstance(dataset, IterableDataset):
        return _limit_stream(dataset, length_of, limit, overlong_prompts, where)

    overlong = {index: n for index in range(len(dataset)) if (n := length_of(dataset[index])) > limit}
    if not overlong:
        return dataset
    if overlong_prompts == "error":
        rows = ", ".join(f"row {i + 1}: {n} tokens" for i, n in list(overlong.items())[:5])
        raise ValueError(_overlong_message(f"{where}: {len(overlong)} of {len(dataset)} prompts are ({rows})", limit))
    count = f"{where}: {len(overlong)} of {len(dataset)} prompts are longer than max_prompt_length={limit} tokens"
    if overlong_prompts == "truncate":
        logger.warning(f"{count} and are truncated to their ends.")
        return dataset
    if len(overlong) == len(dataset):
        raise ValueError(_overlong_message(f"{where}: all {len(dataset)} prompts are", limit, drop=True))
    logger.warning(f"{count} and are dropped.")
    kept = [index for index in range(len(dataset)) if index not in overlong]
    return dataset.select(kept) if isinstance(dataset, Dataset) else Subset(cast(Any, dataset), kept)


def _limit_stream(
    dataset: IterableDataset, length_of: Callable[[dict[str, Any]], int], limit: int, overlong_prompts: str, where: str
) -> IterableDataset:
    def short_enough(example: dict[str, Any]) -> bool:
        length = length_of(example)
        if length > limit and overlong_prompts == "error":
            what = f"{where}: the prompt {example['prompt']!r:.80} is ({length} tokens)"
            raise ValueError(_overlong_message(what, limit))
        return length <= limit

    return dataset if overlong_prompts == "truncate" else dataset.filter(short_enough)


def _overlong_message(what: str, limit: int, drop: bool = False) -> str:
    remedy = "or use overlong_prompts: truncate" if drop else "or use overlong_prompts: drop or truncate"
    return f"{what} longer than max_prompt_length={limit}. Raise max_prompt_length, {remedy}."
