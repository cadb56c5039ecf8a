"""Runs of the project's own code on fake tensors, which have shapes and lifetimes but no numbers: what each phase
allocates besides weights and optimizer."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations import moe

from ..batch import Group, Prompt, RolloutBatch
from ..config import GRPOConfig, mapping
from ..policy import causal_lm, is_packed, pieces
from ..policy.logprobs import evaluate
from ..policy.packing import Stream, pack, pad
from ..rollouts import SamplingParams
from ..rollouts.native.decoder import Runner
from ..rollouts.native.engine import LOW_PRECISION_ON, Memory, Rollout, key_value_bytes
from ..rollouts.sampling import TokenSampler
from .tracker import LiveBytes


class _GroupedProduct(torch.autograd.Function):
    """Allocates what a product of rows (S, in) by their experts' weights (experts, in, out) does, and computes
    nothing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)  # frozen experts need no rows
        return rows.new_empty(len(rows), weight.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad.new_empty(len(grad), weight.shape[1]) if ctx.needs_input_grad[0] else None
        return grad_rows, None if rows is None else torch.empty_like(weight)


@contextlib.contextmanager
def countable_experts() -> Iterator[None]:
    """In here transformers multiplies fake tensors by experts: torch's operator knows fake ones of bf16 alone, and
    transformers' own, before 5.23, looks at their numbers in backward."""
    grouped_mm = moe._grouped_mm  # private, but what every model with experts calls
    moe._grouped_mm = lambda input, weight, offs: _GroupedProduct.apply(input.to(weight.dtype), weight)
    try:
        yield
    finally:
        moe._grouped_mm = grouped_mm


class FakeModel:
    """A model of the meta device whose weights pretend to be on the CPU, so that the code takes the CPU's ways."""

    def __init__(self, model: nn.Module):
        self.mode = FakeTensorMode()
        self.model: Any = model
        copies: dict[int, Tensor] = {}
        with self.mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            if id(tensor) not in copies:
                                copies[id(tensor)] = _like(tensor)
                            tensors[name] = copies[id(tensor)]  # pyright: ignore[reportArgumentType]

    def tensors(self) -> Iterable[Tensor]:
        """Weights and buffers."""
        yield from self.model.parameters()
        yield from self.model.buffers()

    def fake(self, stream: Stream) -> Stream:
        """A stream of real ids as fake ones."""
        inputs = {k: self.mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in stream.inputs.items()}
        scored = stream.scored if isinstance(stream.scored, slice) else self.mode.from_tensor(stream.scored)
        return Stream(
            inputs, scored, self.mode.from_tensor(stream.labels), self.mode.from_tensor(stream.completion_mask)
        )


def _like(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def largest_stream(args: GRPOConfig, prompt_length: int, *, packed: bool) -> tuple[Stream, int]:
    """The largest piece of a micro-batch, if every prompt has `prompt_length` tokens and no completion ends early; and
    how many pieces an optimizer step is at least."""
    size, rows = args.per_device_train_batch_size, args.completions_per_rank
    starts = range(0, rows, size)
    numbers = max(
        ([row // args.num_generations for row in range(start, start + size)] for start in starts),
        key=lambda of_rows: len(set(of_rows)),
    )
    completion = [1] * args.max_completion_length
    groups = [
        Group(Prompt([1] * prompt_length, {}, number), [completion] * count, [True] * count)
        for number in dict.fromkeys(numbers)
        if (count := numbers.count(number))
    ]
    batch = RolloutBatch.from_groups(groups, pad_token_id=0)
    parts = [batch.rows(part) for part in pieces(batch, args.max_tokens_per_microbatch, packed=packed)]
    streams = [pack(part) if packed else pad(part) for part in parts]
    largest = max(streams, key=lambda stream: stream.inputs["input_ids"].numel())
    return largest, len(parts) * args.gradient_accumulation_steps


def autocast(args: GRPOConfig) -> Any:
    """The mixed precision of the run. Fake tensors are on the CPU, so it is the CPU's."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def update_bytes(fake: FakeModel, args: GRPOConfig, prompt_length: int) -> int:
    """Peak of forward and backward: gradients and activations."""
    model = fake.model.train()
    if args.gradient_checkpointing:
        options = mapping(args.gradient_checkpointing_kwargs)
        own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        lm = causal_lm(model)
        # its name since transformers 5.23
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable(options or None, **own)
    stream, count = largest_stream(args, prompt_length, packed=is_packed(model))
    stream = fake.fake(stream)
    entropy: dict[str, Any] = {"with_entropy": True, "entropy_gradient": args.entropy_coef != 0}
    with fake.mode, LiveBytes(fake.tensors()) as memory:
        for _ in range(min(2, count)):  # the second adds its gradients to those of the first
            with autocast(args):
                logps, entropies = evaluate(model, stream, temperature=args.temperature, **entropy)
            loss = logps.sum() if entropies is None or not args.entropy_coef else logps.sum() + entropies.sum()
            del logps, entropies
            loss.backward()
            del loss
    model.zero_grad()
    return memory.peak


def scoring_bytes(fake: FakeModel, args: GRPOConfig, prompt_length: int) -> int:
    """Peak of a pass for old or reference log-probabilities."""
    model = fake.model.eval()
    stream = fake.fake(largest_stream(args, prompt_length, packed=is_packed(model))[0])
    with fake.mode, torch.no_grad(), LiveBytes(fake.tensors()) as memory, autocast(args):
        evaluate(model, stream, temperature=args.temperature, with_entropy=False, entropy_gradient=False)
    return memory.peak


def reward_bytes(fake: FakeModel, rows: int, length: int) -> int:
    """Peak of a reward model's pass over rows of so many tokens."""
    model = fake.model.eval()
    with fake.mode, torch.inference_mode(), LiveBytes(fake.tensors()) as memory:
        ids = torch.ones(rows, length, dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return memory.peak


def rollout_bytes(fake: FakeModel, args: GRPOConfig, prompt_length: int, groups: int) -> tuple[int, int]:
    """The native engine's memory for `groups` groups, and the peak of what prefill and the last step take besides."""
    model = causal_lm(fake.model).eval()
    sampling = _sampling(args)
    prompts = [Prompt([1] * prompt_length, {}, draw) for draw in range(groups)]
    with fake.mode, torch.no_grad(), LiveBytes(fake.tensors()) as tracker, autocast(args):
        memory = Memory(groups, args.num_generations, prompt_length, args.max_completion_length, torch.device("cpu"))
        runner = Runner(model)
        runner.compared = True  # there are no numbers to compare
        rollout = Rollout(model, runner, prompts, sampling, memory)
        while rollout.waiting:
            rollout.admit()
        rollout.step = args.max_completion_length - 2
        rollout.decode()
        kept = sum(tensor.nbytes for tensor in memory.tensors())
    return kept, tracker.peak - kept


def copied_bytes(fake: FakeModel, args: GRPOConfig, device: str) -> int:
    """The copies of weights with which the native engine decodes on a kind of device."""
    model = causal_lm(fake.model)
    if device == "cpu":
        decoder = Runner(model).decoder
        with autocast(args):
            return sum(weight.nbytes for weight in decoder.to_pack()) if decoder is not None else 0
    if device not in LOW_PRECISION_ON or not (args.bf16 or args.fp16):
        return 0
    linear = [m.weight for m in model.modules() if type(m) is nn.Linear]
    return sum(2 * weight.numel() for weight in linear if weight.dtype == torch.float32)


def generate_bytes(fake: FakeModel, args: GRPOConfig, prompt_length: int, groups: int) -> tuple[int, int]:
    """The keys and values of `model.generate`, where each row has its own of the prompt; and the peak of what is taken
    besides: by the pass over all rows' prompts, or by a later step: a layer's keys and values once more when they
    grow, the logits, and what sampling makes of them."""
    model, rows = causal_lm(fake.model).eval(), groups * args.num_generations
    with fake.mode, torch.no_grad(), LiveBytes(fake.tensors()) as prefill, autocast(args):
        ids = torch.ones(rows, prompt_length, dtype=torch.long)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **_last_logits(model))
    cache = rows * key_value_bytes(model, prompt_length + args.max_completion_length)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with fake.mode, torch.no_grad(), LiveBytes() as tracker:
        TokenSampler(_sampling(args))(torch.empty(rows, vocabulary), torch.empty(rows))
    step = cache // model.config.get_text_config().num_hidden_layers + tracker.peak
    return cache, max(step, prefill.peak - cache)


def _last_logits(model: Any) -> dict[str, int]:
    """As `generate` asks for them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _sampling(args: GRPOConfig) -> SamplingParams:
    return SamplingParams(
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        eos_token_ids=(1,),
        pad_token_id=0,
        seed=0,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
    )
