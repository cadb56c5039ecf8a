import functools

import pytest
import torch
import torch.nn.functional as F

from grpo_trl.algorithm import policy_loss, token_weights
from grpo_trl.algorithm.token_weights import TOKEN_WEIGHTINGS

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected), atol=tolerance, rtol=0)


# --- the rules by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_weighting", "expected"),
    [
        ("token", [[1 / 4, 1 / 4, 1 / 4], [1 / 4, 0, 0]]),
        ("sequence", [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]]),
        ("max_length", [[1 / 10, 1 / 10, 1 / 10], [1 / 10, 0, 0]]),  # 2 completions x 5 tokens
        ("sequence_sum", [[1 / 2, 1 / 2, 1 / 2], [1 / 2, 0, 0]]),
    ],
)
def test_rules(token_weighting, expected):
    weights = token_weights(MASK, token_weighting, max_completion_length=5)
    assert_close(weights, expected)
    assert weights.dtype == torch.float32
    assert_close(
        token_weights(MASK, token_weighting, max_completion_length=5, world_size=3), 3 * torch.tensor(expected)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_any_mask_dtype(dtype):
    assert_close(token_weights(MASK.to(dtype), "token", max_completion_length=5), MASK / 4)


@pytest.mark.parametrize(
    ("token_weighting", "expected"),
    [
        ("token", [[1 / 2, 1 / 2, 0], [0, 0, 0], [0, 0, 0]]),
        ("sequence", [[1 / 2, 1 / 2, 0], [0, 0, 0], [0, 0, 0]]),
        ("max_length", [[1 / 5, 1 / 5, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_masked_completions_are_in_no_denominator(token_weighting, expected):
    # a completion of two tokens, and two that are masked (truncated ones, say)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    assert_close(token_weights(mask, token_weighting, max_completion_length=5), expected)


def test_tokens_masked_inside_a_completion_do_not_count():
    # tool output in the middle: the completion is averaged over the three tokens that the policy wrote
    mask = torch.tensor([[1, 0, 1, 1]])
    for token_weighting in ("token", "sequence"):
        assert_close(token_weights(mask, token_weighting, max_completion_length=4), mask / 3)


@pytest.mark.parametrize("token_weighting", TOKEN_WEIGHTINGS)
def test_nothing_to_count(token_weighting):
    assert token_weights(torch.zeros(2, 3), token_weighting, max_completion_length=5).eq(0).all()


@pytest.mark.parametrize("token_weighting", ["token", "sequence"])
def test_weights_sum_to_the_world_size(token_weighting):
    mask = torch.arange(50) < torch.randint(1, 51, (64, 1), generator=torch.Generator().manual_seed(0))
    for world_size in (1, 4):
        weights = token_weights(mask, token_weighting, max_completion_length=50, world_size=world_size)
        assert_close(weights.sum(), float(world_size), 1e-5)


def test_max_length_sums_to_one_only_at_full_length():
    assert_close(token_weights(torch.ones(4, 5), "max_length", max_completion_length=5).sum(), 1.0)
    assert_close(token_weights(torch.ones(4, 2), "max_length", max_completion_length=5).sum(), 2 / 5)


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="token_weighting='mean' is unknown; use one of token, sequence, max_length"):
        token_weights(MASK, "mean", max_completion_length=5)


# --- the same gradient however a step is cut -------------------------------------------------------------------------

VOCABULARY = 7
LENGTHS = torch.tensor([9, 1, 4, 12, 2, 2, 7, 3])
ADVANTAGES = torch.tensor([1.2, -0.4, -0.4, -0.4, 0.0, 0.0, 0.9, -0.9])  # rows 4 and 5: a group of equal rewards


class TinyLM(torch.nn.Module):
    """Next-token model of one previous token: real log-probabilities with a real gradient."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, 16, generator=generator))
        self.head = torch.nn.Parameter(torch.randn(16, VOCABULARY, generator=generator) * 0.3)

    def forward(self, ids):
        return (F.embedding(ids, self.embedding).tanh() @ self.head).log_softmax(-1)


def make_rows(lengths=LENGTHS, advantages=ADVANTAGES, seed=1):
    """Completions of ragged lengths, with the old and reference log-probabilities of other policies."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), int(lengths.max()))
    return {
        "ids": torch.randint(VOCABULARY, (shape[0], shape[1] + 1), generator=generator),
        "loss_mask": (torch.arange(shape[1]) < lengths[:, None]).long(),
        "advantages": advantages,
        "old_per_token_logps": -1.9 + 0.2 * torch.randn(shape, generator=generator),
        "ref_per_token_logps": -1.9 + 0.2 * torch.randn(shape, generator=generator),
    }


def backward(model, rows, weights):
    """One micro-batch, padded to its own longest completion; the gradient is added to what is there."""
    length = max(1, int(rows["loss_mask"].sum(1).max()))
    tensors = {name: value[:, :length] for name, value in rows.items() if name.endswith(("mask", "logps"))}
    logps = model(rows["ids"][:, :length]).gather(-1, rows["ids"][:, 1 : length + 1, None]).squeeze(-1)
    loss, _ = policy_loss(
        logps, advantages=rows["advantages"], token_weights=weights[:, :length], beta=0.05, **tensors
    )
    loss.backward()


def gradient_of(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def step_gradient(rows, weights, micro_batch_size):
    model = TinyLM()
    for start in range(0, len(weights), micro_batch_size):
        chosen = slice(start, start + micro_batch_size)
        backward(model, {name: value[chosen] for name, value in rows.items()}, weights[chosen])
    return gradient_of(model)


@pytest.mark.parametrize("token_weighting", TOKEN_WEIGHTINGS)
def test_accumulation_does_not_change_the_gradient(token_weighting):
    rows = make_rows()
    weights = token_weights(rows["loss_mask"], token_weighting, max_completion_length=16)
    whole, *cut = (step_gradient(rows, weights, size) for size in (8, 2, 1, 3))  # 3: the last one is short
    assert whole.abs().max() > 0.01
    for gradient in cut:
        assert_close(gradient, whole)


@pytest.mark.parametrize("token_weighting", ["token", "sequence"])
def test_weights_made_per_micro_batch_would_change_it(token_weighting):
    # the mistake that the test above guards against is visible in these rows
    rows = make_rows()
    make = functools.partial(token_weights, token_weighting=token_weighting, max_completion_length=16)
    rows["loss_mask"][3:] = 0  # half of the micro-batches hold masked completions only
    right = step_gradient(rows, make(rows["loss_mask"]), 2)
    wrong = step_gradient(rows, torch.cat([make(mask) / 4 for mask in rows["loss_mask"].split(2)]), 2)
    assert (right - wrong).abs().max() > 1e-3


def test_gradient_is_the_plain_mean_over_tokens():
    rows = make_rows()
    weights = token_weights(rows["loss_mask"], "token", max_completion_length=16)
    one_by_one = sum(
        step_gradient({name: value[i : i + 1] for name, value in rows.items()}, rows["loss_mask"][i : i + 1], 1)
        for i in range(8)
    )
    assert_close(step_gradient(rows, weights, 8), one_by_one / LENGTHS.sum(), 1e-6)


@pytest.mark.parametrize("token_weighting", TOKEN_WEIGHTINGS)
def test_each_optimizer_step_of_a_rollout_has_its_own_counts(token_weighting):
    """steps_per_generation = 2 x accumulation: sixteen completions make two steps, not one step of twice the size."""
    short, long = make_rows(LENGTHS.clamp(max=2)), make_rows(LENGTHS + 4, seed=2)
    for rows in (short, long):
        weights = token_weights(rows["loss_mask"], token_weighting, max_completion_length=16)
        tokens = rows["loss_mask"].sum().item()
        expected = {"token": 1.0, "sequence": 1.0, "max_length": tokens / (8 * 16), "sequence_sum": tokens / 8}
        assert_close(weights.sum(), expected[token_weighting])
        assert_close(step_gradient(rows, weights, 2), step_gradient(rows, weights, 8))


@pytest.mark.parametrize("token_weighting", TOKEN_WEIGHTINGS)
def test_masked_rows_change_nothing(token_weighting):
    rows = make_rows()
    kept = torch.tensor([0, 1, 2, 5, 6])
    masked = rows | {"loss_mask": rows["loss_mask"].clone()}
    masked["loss_mask"][[3, 4, 7]] = 0
    alone = {name: value[kept] for name, value in rows.items()}
    gradients = [
        step_gradient(part, token_weights(part["loss_mask"], token_weighting, max_completion_length=16), 4)
        for part in (masked, alone)
    ]
    assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("token_weighting", "share"), [("token", 1 - 4 / 40), ("sequence", 6 / 8), ("max_length", 6 / 8)]
)
def test_groups_of_equal_rewards_stay_in_the_denominator(token_weighting, share):
    """They add nothing to the policy term, and it is averaged over their tokens too: a step in which half of the
    groups are solved moves half as far. (Dropping such groups is dynamic sampling, another choice.)"""
    rows = make_rows() | {"ref_per_token_logps": torch.zeros(8, 12)}
    informative = torch.tensor([0, 1, 2, 3, 6, 7])
    weights = token_weights(rows["loss_mask"], token_weighting, max_completion_length=16)
    dropped = token_weights(rows["loss_mask"][informative], token_weighting, max_completion_length=16)
    assert_close(weights[informative], dropped * share)
