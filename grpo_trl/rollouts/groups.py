"""What comes back from a rollout: complete, in order, readable."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..batch import Group, Prompt


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


def decode_completions(group: Group, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What rewards and logs read: text, or an assistant message when the prompt is a conversation."""
    texts = tokenizer.batch_decode(group.completion_ids, skip_special_tokens=True)
    if isinstance(group.prompt.example["prompt"], str):
        return texts
    return [[{"role": "assistant", "content": text}] for text in texts]
