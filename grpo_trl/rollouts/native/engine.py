"""The fast rollout engine: each prompt is prefilled once, and read once for all rows of its group.

Rows that finish leave at once, and waiting prompts take their place. What is sampled does not depend on any of that
(see `sampling`): it is what `hf_generate` samples.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from psutil import virtual_memory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ...batch import Group, Prompt
from ...placement import input_device
from ...policy.attention import no_mask
from ...policy.head import to_logits
from ...policy.logprobs import causal_lm
from ...policy.mode import evaluation_mode
from ..hf_generate import HFGenerateEngine, check_positions
from ..sampling import SamplingParams, TokenSampler, group_keys, uniforms
from .attention import Grid, PromptLayout, RowsLayout, Shape
from .cache import Cache, Rows
from .cuda_graph import GraphedSteps, bucket
from .decoder import Runner
from .weights import LowPrecisionWeights

logger = logging.get_logger(__name__)

PREFILL_TOKENS = 16384  # of prompts in one forward pass
# Decoding steps between two looks at who has ended, by device: looking makes the host wait for any other than the CPU
CHECK_EVERY = {"cpu": 1, "cuda": 8}
LOW_PRECISION_ON = {"cuda"}


class NativeEngine:
    """Samples with the policy's own layers and weights, attention excepted.

    Args:
        model: a causal LM, with adapters or not, that `policy.prepare` could make run on streams of groups.
        max_concurrent_rows: completions that are decoded at a time, rounded down to whole groups, of which there is at
            least one. Default: as many as keep their keys and values in half of the free memory.
        cache_implementation: of `model.generate`, for what is left to it (see `generate`).
        cuda_graphs: capture decoding steps (CUDA); the memory of a rollout is then kept for the next.
        args, accelerator: of other engines, without effect here.
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
        self.graphs = GraphedSteps() if cuda_graphs else None
        self.memory: Memory | None = None
        self.going_on = 0  # rollouts whose groups are not all taken yet
        self.weights: LowPrecisionWeights | None = None
        self.runner: Runner | None = None
        self.fallback = HFGenerateEngine(
            model, max_concurrent_rows=max_concurrent_rows, cache_implementation=cache_implementation
        )

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Nothing to copy: generation runs on the policy itself."""
        self.model = model
        self.fallback.sync_weights(model)

    def release(self) -> bool:
        """Gives up the memory that is kept between rollouts, with the graphs and copies of weights that are tied to
        it. Returns whether there was some."""
        if self.memory is None or self.graphs is None or self.going_on:
            return False
        self.memory = self.weights = None
        self.graphs.forget()
        return True

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
        longest = max(len(prompt.ids) for prompt in prompts)
        check_positions(model.config, longest, sampling.max_completion_length)
        if self.runner is None or not self.runner.fits(model):
            self.runner = Runner(model)
        weights = self._weights(model)
        with self._alone() as alone, self.runner.rollout():
            graphs = self.graphs if alone and not _waits_for_host(model) else None
            # when the copies of weights are there: as many rows as there is room for besides
            memory = self._memory(model, len(prompts), longest, sampling, kept=graphs is not None)
            graphs = None if sampling.history_processors else graphs  # those run on the host
            rollout = Rollout(model, self.runner, prompts, sampling, memory, graphs)
            while rollout.unfinished:
                # not around the yield, where the consumer's code runs
                with evaluation_mode(self.model), weights.active() if weights else nullcontext(), torch.no_grad():
                    finished = rollout.advance()
                yield from finished

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Around a rollout: whether it does not begin within another. Else it has memory of its own, which no graph
        knows."""
        self.going_on += 1
        try:
            yield self.going_on == 1
        finally:
            self.going_on -= 1

    def _weights(self, model: Any) -> LowPrecisionWeights | None:
        """Copies in autocast's dtype, where it is on and does not keep its own for as long as a rollout takes."""
        device = input_device(model).type
        if device not in LOW_PRECISION_ON or not torch.is_autocast_enabled(device):
            return None
        weights = self.weights or LowPrecisionWeights(model, torch.get_autocast_dtype(device))
        weights.refresh()
        self.weights = weights if self.graphs else None  # graphs read them where they are
        return weights

    def _memory(self, model: Any, prompts: int, longest: int, sampling: SamplingParams, *, kept: bool) -> "Memory":
        size, length = sampling.num_generations, sampling.max_completion_length

        def wanted(prompts: int, longest: int, length: int) -> tuple[int, int, int, int]:
            rows = self.max_concurrent_rows
            tokens = longest + size * length
            groups = rows // size if rows else groups_that_fit(model, tokens, free_memory(model.device))
            return max(1, min(prompts, groups)), size, longest, length

        sizes = wanted(prompts, longest, length)
        if kept and self.memory is not None and self.graphs is not None:
            if self.memory.holds(*sizes):
                return self.memory
            former, self.memory = self.memory.most, None  # before the new one is sized; graphs hold on to it
            self.graphs.forget()
            sizes = wanted(prompts, longest, length)
            if former.columns == size:  # as of training and evaluation: one for both, if it is no smaller for that
                prompts, longest = max(prompts, former.groups), max(longest, former.prompt_length)
                both = wanted(prompts, longest, max(length, former.length))
                sizes = both if both[0] >= max(sizes[0], former.groups) else sizes
        memory = Memory(*sizes, input_device(model))
        if kept:
            self.memory = memory
        return memory


class Memory:
    """Room for `groups` groups of `size` rows, with prompts of `prompt_length` and completions of `length` tokens."""

    def __init__(self, groups: int, size: int, prompt_length: int, length: int, device: torch.device):
        self.most = Shape(groups * size, groups, size, prompt_length, length)
        self.cache = Cache(groups=groups, prompt_length=prompt_length, rows=groups * size, length=length)
        self.grid = Grid(groups, size, device)
        self.rows = Rows(groups * size, length, device)

    def holds(self, groups: int, size: int, prompt_length: int, length: int) -> bool:
        """Whether there is room for so much, in groups of the same size."""
        most = self.most
        fits = groups <= most.groups and prompt_length <= most.prompt_length and length <= most.length
        return fits and size == most.columns

    def tensors(self) -> Iterable[Tensor]:
        """Everything that is allocated so far."""
        for part in (self.grid, self.rows, *self.cache.layers.values()):
            yield from vars(part).values()


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
    """One call of `generate`. Live groups and rows are the first ones in every tensor of the memory."""

    def __init__(
        self,
        model: Any,
        runner: Runner,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        memory: Memory,
        graphs: GraphedSteps | None = None,
    ):
        self.model, self.runner, self.sampling = model, runner, sampling
        self.memory, self.graphs = memory, graphs
        # of kept memory no more rows than memory of our own would have: their number decides how products round
        groups = min(len(prompts), memory.most.groups)
        self.most = memory.most._replace(groups=groups, rows=groups * memory.most.columns)
        self.sampler = TokenSampler(sampling)
        self.device = memory.rows.last.device
        self.eos = torch.tensor(sampling.eos_token_ids, device=self.device)
        self.check_every = CHECK_EVERY.get(self.device.type, 1)
        self.waiting = deque(prompts)
        self.groups: list[LiveGroup] = []
        self.rows: list[Row] = []
        self.columns = 0  # rows of the fullest group; 0: rows or groups have changed
        self.step = 0  # of decoding

    @property
    def unfinished(self) -> bool:
        """Whether there are prompts or completions left."""
        return bool(self.waiting or self.rows)

    def advance(self) -> list[Group]:
        """Goes on until a group is complete."""
        finished: list[Group] = []
        while not finished and self.unfinished:
            if self.waiting and len(self.groups) < self.memory.most.groups:
                self.admit()
            else:
                self.decode()
            if self.step % self.check_every == 0 or self._age_of_oldest() + 1 == self.sampling.max_completion_length:
                finished = self.retire()
        return finished

    def admit(self) -> None:
        """Prefills waiting prompts as far as there is room, and samples the first token of each of their rows."""
        prompts: list[Prompt] = []
        while self.waiting and len(self.groups) + len(prompts) < self.memory.most.groups:
            if prompts and sum(len(prompt.ids) for prompt in [*prompts, self.waiting[0]]) > PREFILL_TOKENS:
                break
            prompts.append(self.waiting.popleft())
        lengths = [len(prompt.ids) for prompt in prompts]
        slots = range(len(self.groups), len(self.groups) + len(prompts))
        ids = torch.tensor([token for prompt in prompts for token in prompt.ids], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": no_mask(self.device)}
        layout = PromptLayout(self.memory.cache, slots, lengths)
        hidden = self.model.base_model(**inputs, use_cache=False, layout=layout).last_hidden_state[0]
        last = (torch.tensor(lengths).cumsum(0) - 1).to(self.device)
        logits = to_logits(self.model, hidden[last])

        size, first = self.sampling.num_generations, len(self.rows)
        new = [LiveGroup(prompt) for prompt in prompts]
        self.groups += new
        self.rows += [Row(group, number, self.step) for group in new for number in range(size)]
        self.columns = 0
        rows, state = slice(first, len(self.rows)), self.memory.rows
        keys = group_keys(self.sampling, [prompt.draw for prompt in prompts]).to(self.device)
        state.uniforms[rows] = uniforms(keys[:, None], torch.arange(state.uniforms.shape[1], device=self.device))
        state.ages[rows], state.ended[rows] = 0, False
        self._accept(rows, logits.repeat_interleave(size, dim=0))
        if self.graphs is not None:  # the first prompts have allocated the last of the memory
            modes = self.runner, adapter_state(self.model)
            self.graphs.sync([*self.model.parameters(), *self.memory.tensors()], modes)

    def decode(self) -> None:
        """One more token for every row."""
        prompt_lengths = [len(group.prompt.ids) for group in self.groups]
        if not self.columns:
            number = {id(group): i for i, group in enumerate(self.groups)}
            self.columns = self.memory.grid.assign([number[id(row.group)] for row in self.rows], prompt_lengths)
        length = self._age_of_oldest() + 1
        shape = Shape(len(self.rows), len(self.groups), self.columns, max(prompt_lengths), length)
        if self.graphs is None:
            self._step(shape._replace(rows=min(self.runner.best_rows(shape.rows), self.memory.most.rows)))
        else:
            shape = bucket(shape, self.most, by_length=not self.runner.by_kernels)
            self.graphs.run(self._step, shape, self.sampling.of_a_step)
        self.step += 1

    def _step(self, shape: Shape) -> None:
        """On what is in the memory, and nothing else: this is what a graph replays."""
        state, grid, n = self.memory.rows, self.memory.grid, shape.rows
        layout = RowsLayout(self.memory.cache, grid, shape, state.ages[:n])
        positions = grid.prompt_lengths[grid.owners[:n]] + state.ages[:n]
        logits = self.runner(state.last[:n], positions, layout)
        state.ages[:n] = (state.ages[:n] + 1).clamp(max=state.tokens.shape[1] - 1)  # rows that nobody reads go on
        self._accept(slice(0, n), logits)

    def retire(self) -> list[Group]:
        """Takes out rows that have ended and groups that are complete; the last ones close the gaps."""
        state, eos = self.memory.rows, set(self.sampling.eos_token_ids)
        ended, ages = state.ended[: len(self.rows)].tolist(), [self.step - row.born for row in self.rows]
        longest = self.sampling.max_completion_length
        leaving = [i for i, age in enumerate(ages) if ended[i] or age + 1 == longest]
        if not leaving:
            return []
        for i, ids, logps in zip(leaving, state.tokens[leaving].tolist(), state.logps[leaving].tolist(), strict=True):
            length = next((place for place, token in enumerate(ids[: ages[i]]) if token in eos), ages[i]) + 1
            self.rows[i].group.completions[self.rows[i].number] = (
                ids[:length],
                logps[:length],
                ids[length - 1] in eos,
            )
        sources, targets = close_gaps(self.rows, leaving)
        if sources:
            self.memory.cache.move_rows(sources, targets, max(ages))
            state.move(sources, targets)
        size = self.sampling.num_generations
        complete = [i for i, group in enumerate(self.groups) if len(group.completions) == size]
        finished = [self.groups[i].as_group() for i in complete]
        sources, targets = close_gaps(self.groups, complete)
        if sources:
            self.memory.cache.move_groups(sources, targets)
        self.columns = 0
        return finished

    def _accept(self, rows: slice, logits: Tensor) -> None:
        """Samples the token of each row that is at its age."""
        state = self.memory.rows
        ages, histories = state.ages[rows, None], self._histories(rows) if self.sampler.needs_history else ()
        tokens, logps = self.sampler(logits, state.uniforms[rows].gather(1, ages)[:, 0], histories)
        state.tokens[rows].scatter_(1, ages, tokens[:, None])
        state.logps[rows].scatter_(1, ages, logps[:, None])
        state.last[rows] = tokens
        state.ended[rows] |= (tokens[:, None] == self.eos).any(dim=1)  # `isin` waits for the device

    def _histories(self, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens so far of the rows of each group, which are equally many; see `TokenSampler`."""
        tokens, ages = self.memory.rows.tokens[rows], self.memory.rows.ages[rows].tolist()
        members: dict[LiveGroup, list[int]] = {}
        for i, row in enumerate(self.rows[rows]):
            members.setdefault(row.group, []).append(i)
        for group, mine in members.items():
            prompt = torch.tensor(group.prompt.ids, device=self.device).expand(len(mine), -1)
            yield torch.tensor(mine, device=self.device), torch.cat([prompt, tokens[mine, : ages[mine[0]]]], dim=1)

    def _age_of_oldest(self) -> int:
        return max((self.step - row.born for row in self.rows), default=0)


def adapter_state(model: Any) -> list[tuple[bool, list[str]]]:
    """Of each layer with adapters: whether they are off, and which are on."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers]


def _waits_for_host(model: Any) -> bool:
    """Experts in fp32, for which torch has no grouped product: it reads on the host how many tokens each gets."""
    return any(weight.dim() == 3 and weight.dtype == torch.float32 for weight in model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes, with what torch keeps of what it has freed."""
    if device.type != "cuda":
        return virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def groups_that_fit(model: Any, tokens: int, free: int) -> int:
    """How many groups of so many tokens keep their keys and values, in autocast's dtype where it is on, in half of the
    free memory."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return free // 2 // key_value_bytes(model, tokens, dtype)


def key_value_bytes(model: Any, tokens: int, dtype: torch.dtype | None = None) -> int:
    """Of the keys and values of so many tokens, in all layers; `dtype`: default that of the model."""
    config = model.config.get_text_config()
    differ = getattr(config, "is_heterogeneous", False)
    layers = config.per_layer_config if differ else [config] * config.num_hidden_layers
    return 2 * tokens * sum(map(_key_size, layers)) * (dtype or model.dtype).itemsize


def _key_size(config: Any) -> int:
    """Numbers of one token's keys in a layer."""
    if not (queries := getattr(config, "num_attention_heads", None)):
        return 0  # no attention
    heads = getattr(config, "num_key_value_heads", None) or queries
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // queries)


def close_gaps(items: list[Any], leaving: Sequence[int]) -> tuple[list[int], list[int]]:
    """Removes items from a list by putting the last ones in their places; returns where from and where to."""
    remaining = len(items) - len(leaving)
    targets = [i for i in leaving if i < remaining]
    sources = [i for i in range(remaining, len(items)) if i not in set(leaving)]
    for source, target in zip(sources, targets, strict=True):
        items[target] = items[source]
    del items[remaining:]
    return sources, targets
