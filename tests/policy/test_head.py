import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from grpo_trl.policy import head
from grpo_trl.policy.head import _is_plain, logit_scale_and_softcap, score, score_completions, to_logits
from tests.tiny import VOCAB_SIZE, tiny_model

M = 37


def hidden_and_labels(model):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, model.config.hidden_size, generator=generator).requires_grad_()
    return hidden, torch.randint(0, VOCAB_SIZE, (M,), generator=generator)


def full(model, hidden, labels, temperature):
    """From the logits of all positions, in fp64."""
    logps = (to_logits(model, hidden).double() / temperature).log_softmax(-1)
    return logps.gather(1, labels[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def gradients(model, hidden, logps):
    model.zero_grad()
    hidden.grad = None
    weights = torch.linspace(-1, 1, M)
    (logps.float() * weights).sum().backward()
    return [hidden.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def lora_head(kind):
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    return get_peft_model(tiny_model(kind), config).get_base_model()


MODELS = {
    "tied": lambda: tiny_model("gemma", tie_word_embeddings=True),
    "untied": lambda: tiny_model("qwen3", tie_word_embeddings=False),
    "softcap": lambda: tiny_model("gemma2"),
    "scale": lambda: tiny_model("cohere", logit_scale=0.3),
    "divided": lambda: tiny_model("granite", logits_scaling=3.0),
    "bias": lambda: tiny_model("phi"),
    "adapter": lambda: lora_head("qwen3"),
}


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_the_whole(name, temperature, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 8)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 0)
    model = MODELS[name]()
    hidden, labels = hidden_and_labels(model)
    logps, entropies = score(model, hidden, labels, temperature=temperature, with_entropy=True)
    expected, expected_entropies = full(model, hidden, labels, temperature)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected_entropies, rtol=1e-5, atol=1e-5)
    assert logps.dtype == entropies.dtype == torch.float32 and not entropies.requires_grad
    ours = gradients(model, hidden, logps)
    for gradient, of_full in zip(
        ours, gradients(model, hidden, full(model, hidden, labels, temperature)[0]), strict=True
    ):
        torch.testing.assert_close(gradient, of_full, rtol=1e-4, atol=1e-6)


def test_weights_in_16_bit_are_scored_in_fp32():
    model = tiny_model("qwen3").to(torch.bfloat16)
    hidden, labels = hidden_and_labels(model)
    hidden = hidden.detach().to(torch.bfloat16)
    logps, entropies = score(model, hidden, labels, temperature=0.6, with_entropy=True)
    expected, expected_entropies = full(model, hidden, labels, 0.6)
    assert to_logits(model, hidden).dtype == logps.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected_entropies, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "untied", "scale", "divided"])
def test_the_fused_kernels_of_trl_compute_the_same(name):
    # on CUDA they stand in for the chunks; TRL has them in plain torch for every other device
    model = MODELS[name]()
    hidden, labels = hidden_and_labels(model)
    logps, entropies = score(model, hidden, labels, temperature=0.6, with_entropy=True)
    ours = gradients(model, hidden, logps)
    fused, fused_entropies = head.fused_scores(model, hidden, labels, temperature=0.6, with_entropy=True)
    torch.testing.assert_close(fused, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_entropies, entropies, rtol=1e-5, atol=1e-5)
    for gradient, of_chunks in zip(gradients(model, hidden, fused), ours, strict=True):
        torch.testing.assert_close(gradient, of_chunks, rtol=1e-4, atol=1e-6)
    assert issubclass(ChunkedLogProbFunction, torch.autograd.Function)


def test_logits_of_all_positions_never_exist(qwen3, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 8)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 0)
    rows = []
    qwen3.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    hidden, labels = hidden_and_labels(qwen3)
    logps, _ = score(qwen3, hidden, labels, temperature=1.0, with_entropy=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        logps, _ = score(qwen3, hidden, labels, temperature=1.0, with_entropy=False)
    logps.sum().backward()
    last = M // -(-M // 8)  # of parts as equal as can be
    # twice above, and once more in the backward pass, which begins with the last
    assert max(rows) == 8 and sum(rows) == 3 * M - last
    sizes = [x.numel() for x in saved if x.data_ptr() != qwen3.lm_head.weight.data_ptr()]
    assert max(sizes) <= max(hidden.numel(), last * qwen3.config.vocab_size)


def test_few_logits_are_made_at_once_and_once(qwen3):
    rows = []
    qwen3.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    hidden, labels = hidden_and_labels(qwen3)
    score(qwen3, hidden, labels, temperature=1.0, with_entropy=True)[0].sum().backward()
    assert rows == [M]


def test_nothing_to_score(qwen3):
    hidden, labels = hidden_and_labels(qwen3)
    logps, entropies = score(qwen3, hidden[:0], labels[:0], temperature=1.0, with_entropy=True)
    assert logps.shape == entropies.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.abs().sum() == 0


def test_scale_and_softcap_of_configurations():
    assert logit_scale_and_softcap(tiny_model("qwen3")) == (1.0, None)
    assert logit_scale_and_softcap(tiny_model("cohere", logit_scale=0.3)) == (0.3, None)
    assert logit_scale_and_softcap(tiny_model("granite", logits_scaling=4.0)) == (0.25, None)
    assert logit_scale_and_softcap(tiny_model("gemma2")) == (1.0, 30.0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name):
    model = MODELS[name]()
    ids = torch.arange(10, 30)[None]
    torch.testing.assert_close(to_logits(model, model.base_model(ids).last_hidden_state), model(ids).logits)


def test_a_copy_calls_its_own_forward(qwen3):
    score_completions(qwen3)
    twin = copy.deepcopy(qwen3)
    with torch.no_grad():
        for parameter in qwen3.parameters():
            parameter.zero_()
    ids = torch.arange(10, 16)[None]
    assert not torch.equal(twin(ids).logits, qwen3(ids).logits)
    assert torch.equal(twin(ids).logits, tiny_model("qwen3")(ids).logits)
    score_completions(qwen3)  # a second time changes nothing
    assert qwen3._forward_to_logits.__func__ is type(qwen3).forward


def test_fused_kernels_are_for_weights_that_are_there():
    assert _is_plain(torch.nn.Linear(2, 3)) and not _is_plain(torch.nn.Linear(2, 3, device="meta"))
