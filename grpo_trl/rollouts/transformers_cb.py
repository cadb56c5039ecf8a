"""transformers' continuous batching: a paged cache, rows that end make room for others."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from ..batch import Group, Prompt
from ..policy.logprobs import causal_lm
from ..policy.mode import evaluation_mode
from .groups import whole_groups
from .sampling import SamplingParams

PAGE = 64  # tokens of a completion for which the cache is taken at a time


class TransformersCBEngine:
    """Samples with `model.generate_batch`. What is sampled depends on the other prompts of the rollout: it draws from
    torch's generator, which is put back as it was.

    Args:
        model: the unwrapped policy; its weights are used where they are.
        max_concurrent_rows: completions that the cache has room for, in whole groups, at least one. Default: all.
        cache_implementation, cuda_graphs, args, accelerator: of other engines, without effect here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_concurrent_rows: int | None = None,
        cache_implementation: str | None = None,
        cuda_graphs: bool = False,
        args: Any = None,
        accelerator: Any = None,
    ):
        self.max_concurrent_rows = max_concurrent_rows
        self.sync_weights(model)
        if not self.model._supports_sdpa:  # private, but where transformers looks
            raise ValueError(
                f"rollout_engine='transformers_cb' samples with sdpa attention, and {type(self.model).__name__} has "
                "none; use hf_generate."
            )

    def sync_weights(self, model: PreTrainedModel) -> None:
        """The weights are the policy's own."""
        self.model = causal_lm(model)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Group]:
        """Yields groups in the order of the prompts, as many at a time as the cache has room for.

        Raises:
            ValueError: options that continuous batching would leave out.
            RuntimeError: a completion that failed, with what transformers says of it.
        """
        check_options(sampling.repetition_penalty, sampling.generation_kwargs, sampling.logits_processors)
        for some in whole_groups(prompts, sampling.num_generations, self.max_concurrent_rows):
            yield from self._generate(some, sampling)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Group]:
        count = sampling.num_distinct
        copies = sampling.num_generations // count
        # a prompt's last token is read by each branch, so that of prompts of one token there would be nothing to begin
        branches = count if any(len(prompt.ids) > 1 for prompt in prompts) else 1
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        # a seed is the state of torch's generator, which is not to be touched
        with evaluation_mode(self.model), _plain(self.model), torch.random.fork_rng(devices):
            outputs = self.model.generate_batch(
                [prompt.ids for prompt in prompts for _ in range(count // branches)],
                generation_config=_generation_config(sampling, branches),
                continuous_batching_config=_batching_config(prompts, sampling),
                warmup=False,
            )
        results = list(outputs.values())
        errors = [result.error for result in results if result.error]
        if errors or len(results) < len(prompts) * count:
            raise RuntimeError(
                f"Continuous batching gave {len(results)} of {len(prompts) * count} completions, with the errors "
                f"{errors}; its log says more. Where memory ran out, set max_concurrent_rows."
            )
        return [
            Group(
                prompt,
                [result.generated_tokens for result in group] * copies,
                terminated=[result.generated_tokens[-1] in sampling.eos_token_ids for result in group] * copies,
                sampling_per_token_logps=[result.logprobs for result in group] * copies,
            )
            for i, prompt in enumerate(prompts)
            for group in [results[i * count : (i + 1) * count]]
        ]


def check_options(
    repetition_penalty: float, generation_kwargs: dict[str, Any], logits_processors: Sequence[Any] = ()
) -> None:
    """Raises a ValueError for options of sampling that continuous batching would leave out."""
    if repetition_penalty != 1 or generation_kwargs or logits_processors:
        raise ValueError(
            "rollout_engine 'transformers_cb' has no repetition_penalty, generation_kwargs and logits_processors; "
            "use native or hf_generate for them."
        )


def _generation_config(sampling: SamplingParams, branches: int) -> GenerationConfig:
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_completion_length,
        num_return_sequences=branches,
        eos_token_id=list(sampling.eos_token_ids),
        pad_token_id=sampling.pad_token_id,
        do_sample=sampling.temperature > 0,
        **(sampled | {"min_p": sampling.min_p} if sampling.temperature else {}),
    )


def _batching_config(prompts: Sequence[Prompt], sampling: SamplingParams) -> ContinuousBatchingConfig:
    """A cache for all rows at once, and passes for all prompts at once, up to the 8192 tokens of transformers' own."""
    rows = len(prompts) * sampling.num_distinct
    pages = sum(-(-(len(prompt.ids) + sampling.max_completion_length) // PAGE) + 1 for prompt in prompts)
    return ContinuousBatchingConfig(
        return_logprobs=True,
        page_size=PAGE,
        num_blocks=pages * sampling.num_distinct,
        max_batch_tokens=min(8192, max(rows, sum(len(prompt.ids) for prompt in prompts))),
        seed=sampling.seed_of(prompts[0].draw),
    )


@contextlib.contextmanager
def _plain(model: Any) -> Iterator[None]:
    """With transformers' own attention, which continuous batching knows (streams of groups are for the update), and
    without the autocast that accelerate put around the forward pass: the cache has the dtype of the weights."""
    attention, forward = model.config._attn_implementation, model.forward
    model.set_attn_implementation("sdpa")
    model.forward = getattr(model, "_original_forward", forward)  # private, but where accelerate keeps it
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.forward = forward
