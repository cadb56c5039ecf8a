"""The entropy of next-token distributions in which some tokens cannot occur."""

import contextlib

import pytest
import torch

from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy import per_token_logps
from grpo_trl.policy.head import scores_of_logits
from tests.tiny import PAD, tiny_model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_tokens_of_probability_zero_add_nothing(temperature, dtype):
    """As models give them that rule tokens out by -inf (padding of the vocabulary, say)."""
    model = tiny_model("qwen3")
    excluded = torch.arange(model.config.vocab_size) >= 250
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.masked_fill(excluded, -torch.inf))
    groups = [Group(Prompt([10, 11, 12], {"prompt": "a"}, 0), [[20, 21, 22], [30, 31, 32]], [True, True])]
    batch = RolloutBatch.from_groups(groups, pad_token_id=PAD)
    autocast = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
    with autocast:
        logps, entropies = per_token_logps(model, batch, temperature=temperature, with_entropy=True)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    with torch.no_grad(), autocast:
        kept = model(ids).logits[:, 2:-1, :250].double() / temperature
    torch.testing.assert_close(
        entropies.double(),
        torch.distributions.Categorical(logits=kept).entropy(),
        rtol=0,
        atol=2e-3 if dtype else 1e-4,
    )
    assert logps.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_are_those_of_the_logits_in_fp32_whatever_autocast_says(dtype):
    logits, labels = 3 * torch.randn(40, 500), torch.arange(40)
    expected = scores_of_logits(logits, labels, with_entropy=True)
    with torch.autocast("cpu", dtype):
        found = scores_of_logits(logits, labels, with_entropy=True)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, exact)


def test_a_policy_that_diverged_has_no_entropy():
    model = tiny_model("qwen3")
    model.lm_head.weight.data[5] = torch.nan
    groups = [Group(Prompt([10], {"prompt": "a"}, 0), [[20]], [True])]
    batch = RolloutBatch.from_groups(groups, pad_token_id=PAD)
    assert per_token_logps(model, batch, with_entropy=True)[1].isnan().all()


@pytest.mark.parametrize("bonus", [0.0, 0.3, -40.0])
def test_gradients_of_logps_and_entropies(bonus):
    """Against autograd through the textbook formula, tokens of probability zero left out. `bonus` is large enough for
    an overflow where they are not."""
    torch.manual_seed(0)
    kept = (3 * torch.randn(5, 7)).requires_grad_()
    labels, weights = torch.tensor([0, 6, 3, 3, 1]), torch.randn(5)
    logits = torch.cat([kept, torch.full((5, 2), -torch.inf)], dim=1)
    logps, entropies = scores_of_logits(logits, labels, with_entropy=True, entropy_gradient=bonus != 0)
    assert entropies.requires_grad == (bonus != 0)
    loss = (weights * logps).sum() + bonus * (weights * entropies).sum()
    (ours,) = torch.autograd.grad(loss, kept)
    exact = torch.distributions.Categorical(logits=kept.double())
    loss = (weights * exact.log_prob(labels)).sum() + bonus * (weights * exact.entropy()).sum()
    (expected,) = torch.autograd.grad(loss, kept)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
