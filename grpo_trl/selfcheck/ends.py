"""The token that ends a turn, as the chat template writes it."""

from collections.abc import Iterable
from typing import Any

from ..batch import Prompt

ANSWER = "grpo-trl-answer"  # no template has this text


def end_of_turn(tokenizer: Any, prompt: Prompt, template_kwargs: dict[str, Any]) -> tuple[list[int], str]:
    """Its id and whose it is: the chat template's, where the prompt goes through one that ends an answer with a
    special token; else the tokenizer's, which may have none."""
    messages = prompt.example["prompt"]
    if isinstance(messages, list):
        kwargs = template_kwargs | (prompt.example.get("chat_template_kwargs") or {})
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        answered = [*asked, {"role": "assistant", "content": ANSWER}]
        text = tokenizer.apply_chat_template(answered, tokenize=False, **kwargs)
        after = tokenizer.encode(text.rpartition(ANSWER)[2], add_special_tokens=False)
        special = (id_ for id_ in after if id_ in tokenizer.added_tokens_decoder)
        if (end := next(special, None)) is not None:
            return [end], "the template's end of turn"
    eos = tokenizer.eos_token_id
    return ([] if eos is None else [eos]), "the tokenizer's EOS"


def token_names(tokenizer: Any, ids: Iterable[int]) -> str:
    """`<|im_end|> (3), <|endoftext|> (1)`; ids without a token stand alone."""
    tokens = [(id_, tokenizer.convert_ids_to_tokens(id_) if 0 <= id_ < len(tokenizer) else None) for id_ in ids]
    return ", ".join(str(id_) if token is None else f"{token} ({id_})" for id_, token in tokens) or "none"
