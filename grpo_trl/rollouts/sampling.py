"""Logits -> token and its log-probability, as a function of identity and not of history.

The uniform number behind token t of row g of draw d is a hash of (seed, stream, d, g, t), and the token is the inverse
CDF of the processed distribution at it. So neither the number of ranks, nor the composition of a batch, nor
evaluation, dropout or a resume changes what is sampled, and nothing needs to be saved.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

TRAIN_STREAM, EVAL_STREAM = 0, 1
BLOCK = 128  # of tokens, whose probabilities are summed up first


@dataclass(frozen=True)
class SamplingParams:
    """How the G completions of each prompt are sampled. Lengths in tokens; temperature 0 is greedy."""

    num_generations: int
    max_completion_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    seed: int
    stream: int = TRAIN_STREAM  # evaluation draws its own numbers
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] = field(default_factory=dict)  # for engines built on `model.generate`
    logits_processors: tuple[LogitsProcessor, ...] = ()  # called first, with each row's prompt and completion so far

    @property
    def truncates(self) -> bool:
        """Whether the sampler's distribution is not the policy's: the importance ratio then leaves out the kept mass
        (huggingface/trl#6789)."""
        others = self.generation_kwargs.keys() - {"use_cache", "cache_implementation"}  # min_new_tokens and the like
        return self.top_p < 1 or self.top_k > 0 or bool(self.min_p) or bool(others) or bool(self.history_processors)

    @property
    def num_distinct(self) -> int:
        """Completions to ask another engine for: greedy ones are all the same."""
        return self.num_generations if self.temperature else 1

    def seed_of(self, draw: int) -> int:
        """For an engine that is given one seed per request: a function of (seed, stream, draw), below 2^62."""
        return int(row_keys(self.seed, self.stream, [draw], [0])) & (2**62 - 1)

    @property
    def of_a_step(self) -> tuple[Any, ...]:
        """What a decoding step without history depends on: two rollouts that agree in it can share a captured one."""
        return self.temperature, self.top_p, self.top_k, self.min_p, self.eos_token_ids

    @property
    def history_processors(self) -> LogitsProcessorList:
        """What changes the logits by what came before. `no_repeat_ngram_size` too: `generate` would see padding."""
        chosen = LogitsProcessorList(self.logits_processors)
        if self.repetition_penalty != 1:
            chosen.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if size := self.generation_kwargs.get("no_repeat_ngram_size"):
            chosen.append(NoRepeatNGramLogitsProcessor(size))
        return chosen


def row_keys(seed: int, stream: int, draws: Sequence[int], rows: Sequence[int]) -> Tensor:
    """One int64 key per row (B,), from the global draw number of its prompt and its place in the group."""
    start = _mix(_mix(torch.tensor(seed)) + stream)
    return _mix(_mix(start + torch.tensor(draws)) + torch.tensor(rows))


def group_keys(params: SamplingParams, draws: Sequence[int]) -> Tensor:
    """The keys of all rows of these draws, groups contiguous (draws x G,)."""
    numbers = range(params.num_generations)
    return row_keys(params.seed, params.stream, *zip(*((d, n) for d in draws for n in numbers), strict=True))


def uniforms(keys: Tensor, step: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1) for token `step` of each row, fp32, the same on every device.

    Keys and steps broadcast. 24 bits, so that u < 1 and u x total < total hold exactly in fp32.
    """
    bits = (_mix(keys + step) >> 40) & 0xFFFFFF
    return bits.float() / (1 << 24)


def sample(scores: Tensor, u: Tensor, *, greedy: bool = False) -> tuple[Tensor, Tensor]:
    """Token and log-probability for each row.

    Args:
        scores: (B, V) fp32, processed (temperature, truncation): what is excluded is -inf.
        u: (B,) in [0, 1).
        greedy: take the most likely token instead.

    Returns:
        tokens (B,) and their log-probabilities (B,) under softmax(scores). Where the scores are no distribution (NaN,
        infinity) the log-probability is NaN and the token any: raising here would wait for the device at each token.
    """
    probs = scores.softmax(-1)
    tokens = scores.argmax(-1, keepdim=True) if greedy else inverse_cdf(probs, u)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """probs (B, V) fp32, u (B,) in [0, 1) -> (B, 1): the token at which the running sum of probabilities passes u
    times their total.

    First among the sums of blocks of tokens, then within one: a running sum over a whole vocabulary is the slowest
    part of a decoding step on CUDA. Running sums are in fp64: parallel ones round neighbours differently, and in fp32
    (2^-24, the grain of u) that would give excluded tokens a height. right=True skips what has none. A block's own
    sum is in fp32, as its probabilities are: in fp64 the CPU makes a copy of all of them first.
    """
    missing = -probs.shape[-1] % BLOCK
    blocks = (pad(probs, (0, missing)) if missing else probs).unflatten(-1, (-1, BLOCK))  # `pad` copies in any case
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = u[:, None] * ends[:, -1:]  # of the sum itself, which is not 1
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[-1] - 1)  # a NaN is below no number
    end, start = ends.gather(-1, block), pad(ends, (1, 0)).gather(-1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    share = ((target - start) / (end - start)).clamp(max=1 - 2**-52)  # below 1, so that the last sum passes it
    place = torch.searchsorted(within, share * within[:, -1:], right=True)
    return (block * BLOCK + place).clamp(max=probs.shape[-1] - 1)


class TokenSampler:
    """From logits to tokens: processors that read what came before, warpers, inverse CDF.

    `histories` are pairs (rows, ids): some rows of the logits, and their tokens so far without any padding
    (rows, length). Padding would show: a repetition penalty, say, would fall on the pad token in rows that happen to
    be padded. They are read only if `needs_history`.
    """

    def __init__(self, sampling: SamplingParams):
        self.processors = sampling.history_processors
        self.warpers = warpers(sampling)
        self.greedy = sampling.temperature == 0
        self.needs_history = bool(self.processors)

    def __call__(
        self, logits: Tensor, u: Tensor, histories: Iterable[tuple[Tensor, Tensor]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and uniform numbers (B,) -> tokens (B,) and their log-probabilities (B,) as sampled."""
        scores: Any = logits.float()
        if self.needs_history:
            scores = scores.clone()
            for rows, ids in histories:
                processed = self.processors(ids, scores[rows])  # pyright: ignore[reportArgumentType]
                scores[rows] = processed.to(scores.dtype)
        return sample(self.warpers(_NO_IDS, scores), u, greedy=self.greedy)


def warpers(params: SamplingParams) -> LogitsProcessorList:
    """Temperature, top-k, top-p and min-p, in the order of transformers; stateless: they read no ids."""
    chosen = LogitsProcessorList()
    if params.temperature not in (0.0, 1.0):
        chosen.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chosen.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chosen.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chosen.append(MinPLogitsWarper(params.min_p))
    return chosen


_NO_IDS: Any = torch.empty(0, 0, dtype=torch.long)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al., 2014) on int64, whose products wrap around. `>>` is arithmetic, hence
    the masks."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
