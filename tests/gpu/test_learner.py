"""Packed = padded on a GPU: by SDPA in fp32, by kernels of variable length in 16 bit."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from grpo_trl.policy import attention, per_token_logps, prepare, varlen
from grpo_trl.policy.attention import GroupLayout, branchwise_attention, varlen_attention
from grpo_trl.policy.head import score
from tests.policy.test_attention import BRANCHES, SHARED, dense, queries_keys_values
from tests.policy.test_packed import batch_of, evaluate, lora, ragged_groups
from tests.tiny import tiny_model

DEVICE = torch.device("cuda")
KINDS = ["qwen3", "llama", "gemma"]


def build(kind="qwen3"):
    return tiny_model(kind, head_dim=32).to(DEVICE)


def batch(num_generations=4):
    return batch_of(ragged_groups(num_generations)).to(DEVICE)


def gap(gradient, expected):
    return float((gradient - expected).norm() / expected.norm())


@pytest.fixture
def autocast():
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="bf16")
    AcceleratorState._reset_state(True)


@pytest.fixture
def varlen_calls(monkeypatch):
    """How often the kernel of variable length was called: twice for a stream in which something is shared."""
    calls, attend = [], varlen.attend
    monkeypatch.setattr(varlen, "attend", lambda *args, **options: calls.append(1) or attend(*args, **options))
    return calls


@pytest.mark.parametrize("num_generations", [1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32(kind, num_generations, varlen_calls):
    groups = batch(num_generations)
    expected = evaluate(build(kind), groups)
    model = build(kind)
    assert prepare(model) is None
    ours = evaluate(model, groups)
    for values, right in zip(ours[:2], expected[:2], strict=True):
        torch.testing.assert_close(values, right, rtol=0, atol=2e-5)
    assert gap(ours[2], expected[2]) < 2e-5
    assert not varlen_calls  # which takes 16 bit only


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointing", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast(kind, checkpointing, adapter, autocast, varlen_calls):
    """As near to fp32 as padded rows are: packing adds no error of its own."""
    groups, results = batch(), {}
    for name in ("fp32", "padded", "packed"):
        model = lora(build(kind)) if adapter else build(kind)
        if name == "packed":
            assert prepare(model) is None
            if checkpointing is not None:
                model.train()
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        results[name] = evaluate(model if name == "fp32" else autocast.prepare_model(model), groups)
    layers = 2
    assert len(varlen_calls) == 2 * layers * (1 if checkpointing is None else 2)  # once more in the backward pass
    exact = results["fp32"]
    gaps = [(results[name][0] - exact[0]).abs().mean() for name in ("padded", "packed")]
    assert 0 < gaps[1] < 2 * gaps[0] < 0.2
    errors = [gap(results[name][2], exact[2]) for name in ("padded", "packed")]
    assert errors[1] < 2 * errors[0] < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights(kind):
    expected = evaluate(build(kind).bfloat16(), batch())
    model = build(kind).bfloat16()
    assert prepare(model) is None
    ours = evaluate(model, batch())
    assert ours[0].dtype == torch.float32
    assert (ours[0] - expected[0]).abs().mean() < 0.05


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_the_kernel_of_variable_length(size, key_heads):
    inputs = queries_keys_values(key_heads=key_heads, size=size)
    layout = GroupLayout(SHARED, BRANCHES)
    weights = torch.randn_like(inputs[0].transpose(1, 2))
    expected = dense(*(x.transpose(1, 2) for x in inputs), layout, 0.2)
    right = torch.autograd.grad((expected * weights).sum(), inputs)

    def on_gpu(implementation, dtype, *args):
        ours = [x.detach().to(DEVICE, dtype).requires_grad_() for x in inputs]
        out = implementation(*(x.transpose(1, 2) for x in ours), *args, 0.2)
        gradients = torch.autograd.grad((out * weights.to(DEVICE)).sum(), ours)
        return [gap(a.double().cpu(), b) for a, b in zip([out, *gradients], [expected, *right], strict=True)]

    assert max(on_gpu(branchwise_attention, torch.float32, layout)) < 1e-5
    assert max(on_gpu(varlen_attention, torch.bfloat16, layout.varlen_index.to(DEVICE))) < 2e-2


def test_which_attention_runs(monkeypatch):
    """By dtype, not by chance: SDPA in fp32, the kernel of variable length in bf16 and fp16."""
    called = []
    for name in ("varlen_attention", "branchwise_attention"):
        original = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, f=original, n=name: called.append(n) or f(*args))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = build().to(dtype)
        assert prepare(model) is None
        called.clear()
        with torch.no_grad():
            assert per_token_logps(model, batch())[0].isfinite().all()
        name = "branchwise_attention" if dtype == torch.float32 else "varlen_attention"
        assert set(called) == {name}, dtype


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_scores_are_those_of_all_logits(temperature):
    model = tiny_model("qwen3", vocab_size=5000)
    hidden = torch.randn(700, 32)
    labels = torch.randint(5000, (700,))
    options = {"temperature": temperature, "with_entropy": True, "entropy_gradient": True}

    def scores(device):
        twin = tiny_model("qwen3", vocab_size=5000).to(device)
        inputs = hidden.to(device).requires_grad_()
        logps, entropies = score(twin, inputs, labels.to(device), **options)
        (logps.sum() + 0.5 * entropies.sum()).backward()
        weight = twin.get_output_embeddings().weight
        return [x.detach().cpu() for x in (logps, entropies, inputs.grad, weight.grad)]

    assert model.dtype == torch.float32
    for ours, expected in zip(scores(DEVICE), scores("cpu"), strict=True):
        assert gap(ours, expected) < 1e-4
