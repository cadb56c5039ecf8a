import math

import pytest
import torch
from torch import nn

from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy import evaluation_mode, per_token_logps
from tests.tiny import BOS, IM_END, PAD, tiny_model

KINDS = ["qwen3", "llama", "gpt2", "gemma", "gemma2", "opt", "bloom"]
ROWS = [
    ([10, 11, 12, 13, 14, 15], [20, 21, 22, 23, IM_END]),
    ([30, 31], [40, IM_END]),  # padded by 4 on the left and by 3 on the right
    ([PAD, 50, BOS], [IM_END]),  # a pad token of the text itself is attended to
    ([60], [61, 62, 63, PAD]),
]


def batch_of(rows=ROWS, pad=PAD):
    groups = [Group(Prompt(prompt, {}, draw=i), [completion], [True]) for i, (prompt, completion) in enumerate(rows)]
    return RolloutBatch.from_groups(groups, pad_token_id=pad)


def build(kind):
    # bloom names its sizes in its own way, and OPT starts its learned positions at 2
    own = {"bloom": {"n_layer": 2, "n_head": 4}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
    return tiny_model(kind, **own.get(kind, {}))


def naive_logps(model, prompt, completion, temperature=1.0):
    """One forward per token, on the bare ids: no padding, no mask, no cache, no slicing."""
    logps = []
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1].double() / temperature
        logps.append(logits.log_softmax(-1)[token])
    return torch.stack(logps)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_one_token_at_a_time(kind, temperature):
    model = build(kind)
    with torch.no_grad():
        logps, entropies = per_token_logps(model, batch_of(), temperature=temperature)
        for row, (prompt, completion) in zip(logps, ROWS, strict=True):
            expected = naive_logps(model, prompt, completion, temperature)
            torch.testing.assert_close(row[: len(completion)].double(), expected, rtol=1e-5, atol=2e-5)
    assert entropies is None
    assert logps.shape == (4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_pad_token_do_not_matter(kind):
    model = build(kind)
    with torch.no_grad():
        padded, _ = per_token_logps(model, batch_of())
        other_pad, _ = per_token_logps(model, batch_of(pad=IM_END))
        for i, row in enumerate(ROWS):
            alone, _ = per_token_logps(model, batch_of([row]))
            length = len(row[1])
            torch.testing.assert_close(padded[i, :length], alone[0], rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(other_pad[i, :length], alone[0], rtol=1e-5, atol=2e-5)


def test_gradient_is_that_of_one_token_at_a_time(qwen3):
    batch = batch_of()
    weights = batch.completion_mask * torch.arange(1, 21).view(4, 5) / 20
    logps, _ = per_token_logps(qwen3, batch)
    (logps * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in qwen3.named_parameters()}
    qwen3.zero_grad()
    total = sum((naive_logps(qwen3, *row) * weights[i, : len(row[1])].double()).sum() for i, row in enumerate(ROWS))
    total.backward()
    for name, parameter in qwen3.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy(qwen3, temperature):
    batch = batch_of()
    logps, entropies = per_token_logps(qwen3, batch, temperature=temperature, with_entropy=True)
    for row, (prompt, completion) in zip(entropies, ROWS, strict=True):
        logits = qwen3(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(row[: len(completion)], expected.detach(), rtol=1e-4, atol=1e-4)
    assert logps.requires_grad and not entropies.requires_grad


class Fixed(nn.Module):
    """Gives the logits it was built with at every position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_entropy_of_known_distributions():
    batch = batch_of([([1], [2, 3])])
    uniform, one_token = torch.zeros(8), torch.tensor([0.0, 0.0, 500.0, 0.0])
    for logits, entropy, logp in [(uniform, math.log(8), -math.log(8)), (one_token, 0.0, 0.0)]:
        logps, entropies = per_token_logps(Fixed(logits), batch, with_entropy=True)
        assert entropies.tolist() == [[pytest.approx(entropy, abs=1e-6)] * 2]
        assert logps[0, 0].item() == pytest.approx(logp, abs=1e-6)


def test_bf16_model_gives_fp32_log_probabilities(qwen3):
    model = qwen3.to(torch.bfloat16)
    logps, entropies = per_token_logps(model, batch_of(), with_entropy=True)
    assert logps.dtype == entropies.dtype == torch.float32
    prompt, completion = ROWS[0]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    assert logits.dtype == torch.bfloat16
    exact = logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    # bf16 logits, but the log-softmax in fp32: one in bf16 would be off by 1e-2
    torch.testing.assert_close(logps[0].double(), exact, rtol=0, atol=1e-5)


# ---- Wrappers ----


def test_a_wrapper_of_another_kind(qwen3):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = qwen3

        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return self.model(input_ids, attention_mask, position_ids=position_ids, use_cache=use_cache)

    expected, _ = per_token_logps(qwen3, batch_of())
    actual, _ = per_token_logps(Plain(), batch_of())
    torch.testing.assert_close(actual, expected)


# ---- Train and eval mode ----


def test_mode_is_left_alone():
    model = tiny_model("qwen3", attention_dropout=0.5).train()
    first, second = (per_token_logps(model, batch_of())[0] for _ in range(2))
    assert model.training and not torch.equal(first, second)
    with evaluation_mode(model):
        first, second = (per_token_logps(model, batch_of())[0] for _ in range(2))
        assert torch.equal(first, second)
    assert model.training


def test_evaluation_mode_restores_each_module():
    model = nn.Sequential(nn.Dropout(), nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False, True, True]
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == before
