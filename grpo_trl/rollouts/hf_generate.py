"""`model.generate`: the reference implementation of a rollout engine, and the fallback of the faster ones."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from ..batch import Group, Prompt, RolloutBatch
from ..policy.logprobs import causal_lm, decoder_start, is_encoder_decoder
from ..policy.mode import evaluation_mode
from ..policy.packing import decoder_inputs, encoder_inputs
from .groups import whole_groups
from .sampling import SamplingParams, TokenSampler, group_keys, uniforms


class HFGenerateEngine:
    """Samples with `model.generate` on left-padded prompts; a logits processor picks the token (see `sampling`).

    Args:
        model: any that transformers can generate with.
        max_concurrent_rows: completions per call of `generate`, rounded down to whole groups, of which there is at
            least one. Default: all.
        cache_implementation: the cache of `generate`, e.g. "static".
        cuda_graphs, args, accelerator: of other engines, without effect here.
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
        self.model: Any = model
        self.max_concurrent_rows = max_concurrent_rows
        self.cache_implementation = cache_implementation

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Nothing to copy: generation runs on the policy itself."""
        self.model = model

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Group]:
        """Yields the groups in the order of the prompts, all those of one `generate` call at its end."""
        longest = max(len(prompt.ids) for prompt in prompts)
        forced = len(decoder_start(self.model)) - 1 if is_encoder_decoder(self.model) else 0
        check_positions(self.model.config, longest, sampling.max_completion_length + forced)
        for some in whole_groups(prompts, sampling.num_generations, self.max_concurrent_rows):
            yield from self._generate(some, sampling)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Group]:
        num_generations = sampling.num_generations
        rows = RolloutBatch.from_groups(
            [Group(prompt, [[] for _ in range(num_generations)], [False] * num_generations) for prompt in prompts],
            pad_token_id=sampling.pad_token_id,
        ).to(self.model.device)
        keys = group_keys(sampling, [prompt.draw for prompt in prompts]).to(self.model.device)
        inputs = {"input_ids": rows.prompt_ids, "attention_mask": rows.prompt_mask}
        config = self._generation_config(sampling)
        before = rows.prompt_mask  # of the tokens that `generate` goes on from
        if is_encoder_decoder(self.model):
            start = decoder_start(self.model)
            inputs = encoder_inputs(rows) | decoder_inputs(rows, start)
            before = inputs["decoder_attention_mask"]
            config.decoder_start_token_id = start[0]  # or `generate` would look for one
        sampler = _Sampler(sampling, keys, before)
        with evaluation_mode(self.model), _own_generation_config_aside(self.model), torch.no_grad():
            output = self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                # by itself `generate` would keep step with the other ranks wherever an engine shards, also where the
                # weights were gathered for the rollout
                synced_gpus=is_sharded(self.model),
            )
        ids = output[:, before.shape[1] :].cpu()
        logps = torch.stack(sampler.per_token_logps, dim=1).cpu()
        lengths, terminated = completion_lengths(ids, sampling.eos_token_ids)
        rows_of = [range(i * num_generations, (i + 1) * num_generations) for i in range(len(prompts))]
        return [
            Group(
                prompt,
                completion_ids=[ids[row, : lengths[row]].tolist() for row in group],
                terminated=[bool(terminated[row]) for row in group],
                sampling_per_token_logps=[logps[row, : lengths[row]].tolist() for row in group],
            )
            for prompt, group in zip(prompts, rows_of, strict=True)
        ]

    def _generation_config(self, sampling: SamplingParams) -> GenerationConfig:
        options = {
            "max_new_tokens": sampling.max_completion_length,
            "eos_token_id": list(sampling.eos_token_ids),
            "pad_token_id": sampling.pad_token_id,
            # the processor leaves one token, so argmax takes it and torch's generator is not touched
            "do_sample": False,
            "use_cache": True,
            "cache_implementation": self.cache_implementation,
            "disable_compile": True,
        }
        of_the_sampler = {"no_repeat_ngram_size": None}  # see `SamplingParams.history_processors`
        return GenerationConfig(**(options | sampling.generation_kwargs | of_the_sampler))


@contextlib.contextmanager
def _own_generation_config_aside(model: nn.Module) -> Iterator[None]:
    """`generate` fills what it was not given from the model's own config, whose penalties and minimum lengths would
    make what is sampled another distribution than the one that is trained."""
    owner = causal_lm(model)
    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = own


class _Sampler(LogitsProcessor):
    """Picks each row's token by inverse CDF, records its log-probability, and leaves only that token."""

    def __init__(self, sampling: SamplingParams, keys: Tensor, prompt_mask: Tensor):
        self.sample = TokenSampler(sampling)
        self.keys = keys
        self.prompt_length = prompt_mask.shape[1]
        first = prompt_mask.argmax(1)  # column of the first real token
        self.rows_by_first = {int(column): (first == column).nonzero()[:, 0] for column in first.unique()}
        self.per_token_logps: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        u = uniforms(self.keys, input_ids.shape[1] - self.prompt_length)
        histories = ((rows, input_ids[rows, first:]) for first, rows in self.rows_by_first.items())
        tokens, logps = self.sample(scores, u, histories)
        self.per_token_logps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def check_positions(config: Any, prompt_length: int, completion_length: int) -> None:
    """Raises a ValueError when a model with a table of positions (GPT-2, OPT) has too few; rotary ones have no end."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    lengths = (prompt_length, completion_length)
    needed = max(lengths) if config.is_encoder_decoder else sum(lengths)
    if positions is None or positions < 0 or getattr(text_config, "rope_parameters", None) or needed <= positions:
        return
    raise ValueError(
        f"A prompt of {prompt_length} tokens and max_completion_length={completion_length} need more than the "
        f"{positions} positions of the model; lower max_completion_length or set max_prompt_length."
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 keeps weights in shards that every forward pass has to gather."""
    return any(p.numel() < getattr(p, "ds_numel", 0) for p in model.parameters())


def completion_lengths(ids: Tensor, eos_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, T) sampled ids -> lengths (B,) up to and including the first EOS, and whether there was one (B,)."""
    is_eos = torch.isin(ids, torch.tensor(eos_token_ids, device=ids.device))
    terminated = is_eos.any(1)
    return torch.where(terminated, is_eos.int().argmax(1) + 1, ids.shape[1]), terminated
