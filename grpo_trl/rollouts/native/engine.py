"""The fast rollout engine: each prompt is prefilled once, and read once for all rows of its group.

Rows that finish leave at once, and waiting prompts take their place. What is sampled does not depend on any of that
(see `sampling`): it is what `hf_generate` samples.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from psutil import virtual_memory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ...batch import Group, Prompt
from ...placement import input_device
from ...policy.attention import Layout, no_mask
from ...policy.head import to_logits
from ...policy.logprobs import causal_lm
from ...policy.mode import evaluation_mode
from ..hf_generate import HFGenerateEngine, check_positions
from ..sampling import SamplingParams, TokenSampler, group_keys, uniforms
from .attention import Grid, PromptLayout, RowsLayout
from .cache import Cache

logger = logging.get_logger(__name__)

PREFILL_TOKENS = 16384  # of prompts in one forward pass


class NativeEngine:
    """Samples with the policy's own layers and weights, attention excepted.

    Args:
        model: a causal LM, with adapters or not, that `policy.prepare` could make run on streams of groups.
        max_concurrent_rows: completions that are decoded at a time, rounded down to whole groups, of which there is at
            least one. Default: as many as keep their keys and values in half of the free memory.
        cache_implementation: of `model.generate`, for what is left to it (see `generate`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_concurrent_rows: int | None = None,
        cache_implementation: str | None = None,
    ):
        self.model: Any = model
        self.max_concurrent_rows = max_concurrent_rows
        self.fallback = HFGenerateEngine(
            model, max_concurrent_rows=max_concurrent_rows, cache_implementation=cache_implementation
        )

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Nothing to copy: generation runs on the policy itself."""
        self.model = model
        self.fallback.sync_weights(model)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Iterator[Group]:
        """Yields each group when its last row has ended. `generation_kwargs` are left to `model.generate`."""
        if sampling.generation_kwargs:
            logger.warning_once(
                f"generation_kwargs {', '.join(sampling.generation_kwargs)} are left to model.generate, which is "
                "slower than the native engine."
            )
            yield from self.fallback.generate(prompts, sampling)
            return
        model = causal_lm(self.model)
        check_positions(model.config, max(len(prompt.ids) for prompt in prompts), sampling.max_completion_length)
        rollout = Rollout(model, prompts, sampling, self.max_concurrent_rows)
        while rollout.unfinished:
            # not around the yield, where the consumer's code runs
            with evaluation_mode(self.model), torch.no_grad():
                finished = rollout.advance()
            yield from finished


@dataclass(eq=False)
class LiveGroup:
    """A prompt that is being completed, and those of its G completions that have ended."""

    prompt: Prompt
    completions: dict[int, tuple[list[int], list[float], bool]] = field(default_factory=dict)

    def as_group(self) -> Group:
        """The completions in the order of their numbers."""
        ids, logps, terminated = zip(*(self.completions[n] for n in range(len(self.completions))), strict=True)
        return Group(self.prompt, list(ids), list(terminated), sampling_per_token_logps=list(logps))


@dataclass
class Row:
    """A completion that is being decoded: which, and the decoding step at which its prompt was prefilled."""

    group: LiveGroup
    number: int
    born: int


class Rollout:
    """The state of one call of `generate`. Live groups and rows are the first ones in every tensor."""

    def __init__(self, model: Any, prompts: Sequence[Prompt], sampling: SamplingParams, max_rows: int | None):
        self.model, self.sampling, self.sampler = model, sampling, TokenSampler(sampling)
        size, length = sampling.num_generations, sampling.max_completion_length
        longest = max(len(prompt.ids) for prompt in prompts)
        most = max_rows // size if max_rows else groups_that_fit(model, longest + size * length)
        num_groups = max(1, min(len(prompts), most))
        num_rows = num_groups * size
        self.cache = Cache(groups=num_groups, prompt_length=longest, rows=num_rows, length=length)
        self.waiting = deque(prompts)
        self.groups: list[LiveGroup] = []
        self.rows: list[Row] = []
        self.grid: Grid | None = None  # None: rows or groups have changed
        self.step = 0  # of decoding
        device = input_device(model)
        self.eos = torch.tensor(sampling.eos_token_ids, device=device)
        self.keys = torch.zeros(num_rows, dtype=torch.long, device=device)  # of the random numbers
        self.tokens = torch.zeros(num_rows, length, dtype=torch.long, device=device)
        self.logps = torch.zeros(num_rows, length, device=device)
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=device)

    @property
    def unfinished(self) -> bool:
        """Whether there are prompts or completions left."""
        return bool(self.waiting or self.rows)

    def advance(self) -> list[Group]:
        """Goes on until a group is complete."""
        finished: list[Group] = []
        while not finished and self.unfinished:
            if self.waiting and len(self.groups) < self.cache.groups:
                self.admit()
            else:
                self.decode()
            finished = self.retire()
        return finished

    def admit(self) -> None:
        """Prefills waiting prompts as far as there is room, and samples the first token of each of their rows."""
        prompts: list[Prompt] = []
        while self.waiting and len(self.groups) + len(prompts) < self.cache.groups:
            if prompts and sum(len(prompt.ids) for prompt in [*prompts, self.waiting[0]]) > PREFILL_TOKENS:
                break
            prompts.append(self.waiting.popleft())
        lengths = [len(prompt.ids) for prompt in prompts]
        layout = PromptLayout(self.cache, range(len(self.groups), len(self.groups) + len(prompts)), lengths)
        ids = torch.tensor([token for prompt in prompts for token in prompt.ids], device=self.keys.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.keys.device)
        hidden = self._run(ids[None], positions[None], layout)[0]
        last = torch.tensor(lengths).cumsum(0) - 1
        logits = to_logits(self.model, hidden[last.to(self.keys.device)])

        size, first = self.sampling.num_generations, len(self.rows)
        new = [LiveGroup(prompt) for prompt in prompts]
        self.groups += new
        self.rows += [Row(group, number, self.step) for group in new for number in range(size)]
        rows = slice(first, len(self.rows))
        self.keys[rows] = group_keys(self.sampling, [prompt.draw for prompt in prompts]).to(self.keys.device)
        self.ended[rows] = False
        self._accept(rows, 0, logits.repeat_interleave(size, dim=0))
        self.grid = None

    def decode(self) -> None:
        """One more token for every row."""
        n = len(self.rows)
        grid = self.grid = self.grid or self._new_grid()
        oldest = self.step - min(row.born for row in self.rows)  # place of its last token in its completion
        ages = oldest if grid.births is None else self.step - grid.births
        last = self.tokens[:n, ages] if isinstance(ages, int) else self.tokens[:n].gather(1, ages[:, None])[:, 0]
        layout = RowsLayout(self.cache, grid, ages, length=oldest + 1)
        hidden = self._run(last[:, None], (grid.prompt_lengths + ages)[:, None], layout)
        self._accept(slice(0, n), ages + 1, to_logits(self.model, hidden[:, 0]))
        self.step += 1

    def retire(self) -> list[Group]:
        """Takes out rows that have ended and groups that are complete; the last ones close the gaps."""
        ended, length = self.ended[: len(self.rows)].tolist(), self.sampling.max_completion_length
        ages = [self.step - row.born + 1 for row in self.rows]
        leaving = [i for i, age in enumerate(ages) if ended[i] or age == length]
        if not leaving:
            return []
        eos = set(self.sampling.eos_token_ids)
        for i, ids, logps in zip(leaving, self.tokens[leaving].tolist(), self.logps[leaving].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(ids[: ages[i]]) if token in eos), ages[i])
            self.rows[i].group.completions[self.rows[i].number] = (ids[:end], logps[:end], ids[end - 1] in eos)
        moves = close_gaps(self.rows, leaving)
        if moves[0]:
            self.cache.move_rows(*moves, max(ages))
            for state in (self.keys, self.tokens, self.logps, self.ended):
                state[moves[1]] = state[moves[0]]
        complete = [
            i for i, group in enumerate(self.groups) if len(group.completions) == self.sampling.num_generations
        ]
        finished = [self.groups[i].as_group() for i in complete]
        moves = close_gaps(self.groups, complete)
        if moves[0]:
            self.cache.move_groups(*moves)
        self.grid = None
        return finished

    def _new_grid(self) -> Grid:
        number = {id(group): i for i, group in enumerate(self.groups)}
        owners, births = zip(*((number[id(row.group)], row.born) for row in self.rows), strict=True)
        return Grid([len(group.prompt.ids) for group in self.groups], owners, births, self.keys.device)

    def _accept(self, rows: slice, place: int | Tensor, logits: Tensor) -> None:
        """Samples token number `place` of the rows."""
        histories = self._histories(rows, place) if self.sampler.needs_history else ()
        tokens, logps = self.sampler(logits, uniforms(self.keys[rows], place), histories)
        if isinstance(place, int):
            self.tokens[rows, place], self.logps[rows, place] = tokens, logps
        else:
            self.tokens[rows].scatter_(1, place[:, None], tokens[:, None])
            self.logps[rows].scatter_(1, place[:, None], logps[:, None])
        self.ended[rows] |= torch.isin(tokens, self.eos)

    def _histories(self, rows: slice, place: int | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens so far of the rows of each group, which are equally many; see `TokenSampler`."""
        for group in dict.fromkeys(row.group for row in self.rows[rows]):
            mine = [i for i, row in enumerate(self.rows[rows]) if row.group is group]
            count = place if isinstance(place, int) else int(place[mine[0]])
            prompt = torch.tensor(group.prompt.ids, device=self.keys.device).expand(len(mine), -1)
            yield torch.tensor(mine, device=prompt.device), torch.cat([prompt, self.tokens[rows][mine, :count]], dim=1)

    def _run(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """(B, N) -> hidden states (B, N, d) as the head takes them."""
        model = self.model.base_model
        mask = no_mask(ids.device)
        return model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, layout=layout
        ).last_hidden_state


def groups_that_fit(model: Any, tokens: int) -> int:
    """How many groups of so many tokens keep their keys and values in half of the memory that is free now."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = 2 * tokens * config.num_hidden_layers * heads * size * model.dtype.itemsize
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else virtual_memory().available
    return free // 2 // group


def close_gaps(items: list[Any], leaving: Sequence[int]) -> tuple[list[int], list[int]]:
    """Removes items from a list by putting the last ones in their places; returns where from and where to."""
    remaining = len(items) - len(leaving)
    targets = [i for i in leaving if i < remaining]
    sources = [i for i in range(remaining, len(items)) if i not in set(leaving)]
    for source, target in zip(sources, targets, strict=True):
        items[target] = items[source]
    del items[remaining:]
    return sources, targets
