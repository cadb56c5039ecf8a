"""Packed = padded: log-probabilities, entropies and gradients of streams of groups, for every kind of model."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call

from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy import causal_lm, per_token_logps, pieces, prepare
from tests.tiny import VOCAB_SIZE, tiny_model

KINDS = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "llama": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "phi3": {},
    "olmo": {},
    "gpt2": {},
}


def build(kind):
    return tiny_model(kind, **KINDS.get(kind, {}))


def ragged_groups(num_generations, seed=0):
    """Prompts and completions of 1 to 9 tokens, a prompt and a completion of a single token among them."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(7, VOCAB_SIZE, (length,), generator=generator).tolist()

    def lengths(n):
        return torch.randint(1, 10, (n,), generator=generator).tolist()

    groups = []
    for draw, prompt_length in enumerate([5, 1, *lengths(2)]):
        completions = [ids(length) for length in [1, *lengths(num_generations - 1)]]
        groups.append(Group(Prompt(ids(prompt_length), {}, draw), completions, [True] * num_generations))
    return groups


def batch_of(groups):
    return RolloutBatch.from_groups(groups, pad_token_id=0)


def evaluate(model, batch, temperature=0.7):
    """Log-probabilities, entropies, and the gradient of a weighted sum, as one vector."""
    model.zero_grad()
    logps, entropies = per_token_logps(model, batch, temperature=temperature, with_entropy=True)
    mask = batch.completion_mask.bool()
    weights = torch.linspace(-1, 1, int(mask.sum()), device=logps.device)
    (logps[mask] * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logps[mask].detach(), entropies[mask], gradient


def assert_equal(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1], expected[1], rtol=0, atol=1e-5)
    assert (ours[2] - expected[2]).norm() <= 1e-5 * expected[2].norm()


@pytest.mark.parametrize("num_generations", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, num_generations):
    model = build(kind)
    for seed in (0, 1):
        batch = batch_of(ragged_groups(num_generations, seed))
        expected = evaluate(model, batch)  # a model that nothing was done to: padded, from all its logits
        twin = build(kind)
        assert prepare(twin) is None and twin.evaluation == "packed"
        assert_equal(evaluate(twin, batch), expected)


def lora(model):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_gradient_checkpointing(kind, use_reentrant, adapter):
    batch, models = batch_of(ragged_groups(4)), []
    for _ in range(2):
        model = lora(build(kind)) if adapter else build(kind)
        if adapter:
            model.enable_input_require_grads()
        models.append(model.train())
    expected = evaluate(models[0], batch)
    assert prepare(models[1]) is None
    models[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    layers = []
    attention = next(module for name, module in models[1].named_modules() if name.endswith(("self_attn", ".attn")))
    attention.register_forward_hook(lambda *args: layers.append(1))
    assert_equal(evaluate(models[1], batch), expected)
    assert len(layers) == 2  # once more in the backward pass: checkpointing was on


def test_without_gradient(qwen3):
    batch = batch_of(ragged_groups(3))
    prepare(qwen3)
    with torch.no_grad():
        logps, _ = per_token_logps(qwen3, batch)
    assert not logps.requires_grad
    assert (logps[~batch.completion_mask.bool()] == 0).all()
    torch.testing.assert_close(logps, per_token_logps(qwen3, batch)[0].detach())


@pytest.mark.parametrize("max_tokens", [1, 25, 60])
def test_pieces_add_up_to_the_gradient(qwen3, max_tokens):
    batch = batch_of(ragged_groups(4))
    prepare(qwen3)
    weights = torch.linspace(-1, 1, batch.completion_ids.numel()).view_as(batch.completion_ids)

    def gradient(max_tokens):
        qwen3.zero_grad()
        for rows in pieces(batch, max_tokens, packed=True):
            part = batch.rows(rows)
            logps, _ = per_token_logps(qwen3, part)
            (logps * weights[rows][:, : logps.shape[1]] * part.completion_mask).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in qwen3.parameters()])

    whole = gradient(None)
    assert len(pieces(batch, max_tokens, packed=True)) > 1
    assert (gradient(max_tokens) - whole).norm() <= 1e-6 * whole.norm()


def test_a_prompt_is_run_once(qwen3):
    prepare(qwen3)
    rows = []
    qwen3.model.layers[0].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2]))
    groups = ragged_groups(8)
    per_token_logps(qwen3, batch_of(groups))
    shared = sum(len(group.prompt.ids) - 1 for group in groups)
    assert rows == [(1, shared + sum(len(ids) for group in groups for ids in group.completion_ids))]


def test_attention_dropout_is_kept():
    model = tiny_model("qwen3", attention_dropout=0.5).train()
    assert prepare(model) is None
    batch = batch_of(ragged_groups(3))
    first, second = (per_token_logps(model, batch)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (per_token_logps(model.eval(), batch)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---- Precision and wrappers ----


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_bf16_autocast(kind, accelerator):
    batch = batch_of(ragged_groups(4))
    exact = evaluate(build(kind), batch)
    padded = evaluate(accelerator.prepare_model(build(kind)), batch)
    model = build(kind)
    prepare(model)
    packed = evaluate(accelerator.prepare_model(model), batch)
    assert packed[0].dtype == torch.float32
    # as near to fp32 as the padded rows are: bf16 was on in both, and packing adds no error of its own
    gaps = [(logps - exact[0]).abs().mean() for logps in (padded[0], packed[0])]
    assert 0 < gaps[1] < 2 * gaps[0] < 0.2
    errors = [(gradient - exact[2]).norm() / exact[2].norm() for gradient in (padded[2], packed[2])]
    assert errors[1] < 2 * errors[0] < 0.2


def test_bf16_weights():
    batch = batch_of(ragged_groups(4))
    padded = evaluate(build("qwen3").bfloat16(), batch)
    model = build("qwen3").bfloat16()
    assert prepare(model) is None
    packed = evaluate(model, batch)
    assert packed[0].dtype == torch.float32
    assert (packed[0] - padded[0]).abs().max() < 0.3


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_ddp(adapter, process_group):
    batch = batch_of(ragged_groups(4))
    plain, model = (lora(build("qwen3")) if adapter else build("qwen3") for _ in range(2))
    expected = evaluate(plain, batch)
    assert prepare(model) is None
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert causal_lm(wrapped) is causal_lm(model)
    assert_equal(evaluate(wrapped, batch), expected)


def test_gradients_of_fp64_by_finite_differences():
    """The merged attention's backward pass against nothing but its forward pass."""
    model = build("qwen3").double()
    prepare(model)
    batch = batch_of(ragged_groups(3))
    name, weight = next((n, p) for n, p in model.named_parameters() if "k_proj" in n)
    direction = torch.randn_like(weight)

    def loss(step):
        parameters = {name: weight + step * direction}
        ours = Bound(model, parameters)
        logps, _ = per_token_logps(ours, batch)
        return (logps.double() * batch.completion_mask).sum()

    (gradient,) = torch.autograd.grad(loss(0.0), weight)
    slope = (gradient * direction).sum()
    numeric = (loss(1e-3) - loss(-1e-3)) / 2e-3
    torch.testing.assert_close(slope, numeric, rtol=1e-3, atol=1e-3)


class Bound(nn.Module):
    """A model with some of its parameters replaced, wrapped as DDP wraps one."""

    def __init__(self, module, parameters):
        super().__init__()
        self.module, self.parameters_ = module, parameters

    def forward(self, **kwargs):
        return functional_call(self.module, self.parameters_, kwargs=kwargs)
