"""What comes back from a rollout: complete, in order, readable."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from ..batch import Group, Prompt


def whole_groups(prompts: Sequence[Prompt], num_generations: int, rows: int | None) -> list[Sequence[Prompt]]:
    """The prompts in portions of at most `rows` completions (None: all at once), of one prompt at least."""
    size = max(1, rows // num_generations) if rows else len(prompts)
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def ordered_groups(prompts: Sequence[Prompt], groups: Iterable[Group], num_generations: int) -> list[Group]:
    """The groups in the order of the prompts.

    Raises:
        ValueError: a prompt without a group, a group without a prompt, or one with another number of completions.
    """
    by_draw = {group.prompt.draw: group for group in groups}
    missing = [prompt.draw for prompt in prompts if prompt.draw not in by_draw]
    wrong = [draw for draw, group in by_draw.items() if len(group) != num_generations]
    if missing or wrong or len(by_draw) != len(prompts):
        raise ValueError(
            f"rollout() must give one group of {num_generations} completions for each of its {len(prompts)} prompts; "
            f"draws without a group: {missing}, draws with another number of completions: {wrong}."
        )
    return [by_draw[prompt.draw] for prompt in prompts]


def check_finite(group: Group) -> Group:
    """The group, sampled by an engine that runs the policy.

    Raises:
        FloatingPointError: a token was sampled from logits that are not finite: its log-probability is NaN.
    """
    for row, logps in enumerate(group.sampling_per_token_logps or []):
        for position, logp in enumerate(logps):
            if math.isnan(logp):
                raise FloatingPointError(
                    f"The policy's logits are not finite at token {position} of completion {row} of draw "
                    f"{group.prompt.draw}: its weights have diverged, or had NaN from the start (or generation_kwargs "
                    "leave no token). Look at grad_norm, kl and loss of the steps before; lower learning_rate or "
                    "max_grad_norm, use bf16 instead of fp16, and start again from a checkpoint before that."
                )
    return group


def _parsed(tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt_ids: list[int], terminated: bool) -> Any:
    message = parse_response(tokenizer, ids, prefix=prompt_ids)
    if terminated and isinstance(message.get("content"), str):  # parsing takes off the tokenizer's own EOS alone
        message["content"] = message["content"].removesuffix(str(tokenizer.decode(ids[-1:])))
    return message


def decode_completions(group: Group, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What rewards and logs read: text, or an assistant message when the prompt is a conversation; as TRL, one that is
    parsed (into reasoning, content, tool calls) where the tokenizer says how."""
    is_text = isinstance(group.prompt.example["prompt"], str)
    if not is_text and getattr(tokenizer, "response_template", None):
        rows = zip(group.completion_ids, group.terminated, strict=True)
        return [[_parsed(tokenizer, ids, group.prompt.ids, terminated)] for ids, terminated in rows]
    texts = tokenizer.batch_decode(group.completion_ids, skip_special_tokens=True)
    return texts if is_text else [[{"role": "assistant", "content": text}] for text in texts]
