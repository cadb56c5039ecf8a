import math

import pytest
import torch
from scipy import stats
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_trl.rollouts.sampling import (
    EVAL_STREAM,
    TRAIN_STREAM,
    SamplingParams,
    inverse_cdf,
    row_keys,
    sample,
    uniforms,
    warpers,
)

LARGEST_U = 1 - 2**-24  # `uniforms` has 24 bits
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, -3.0, 1.0, 0.0, -0.5])


def params(**options):
    fixed = {"num_generations": 4, "max_completion_length": 8, "eos_token_ids": (1,), "pad_token_id": 0, "seed": 0}
    return SamplingParams(**(fixed | options))


def table(seed=42, stream=TRAIN_STREAM, num_draws=250, group_size=8, num_tokens=100):
    """u of every (draw, row of the group, token): (num_draws, group_size, num_tokens)."""
    draws = [d for d in range(num_draws) for _ in range(group_size)]
    rows = list(range(group_size)) * num_draws
    keys = row_keys(seed, stream, draws, rows)
    u = torch.stack([uniforms(keys, t) for t in range(num_tokens)], dim=1)
    return u.reshape(num_draws, group_size, num_tokens)


@pytest.mark.parametrize("seed", [0, 42, 2**31 - 1])
def test_uniforms_are_uniform(seed):
    u = table(seed).flatten().double()
    assert len(u) == 200_000
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-4
    assert stats.chisquare(torch.histc(u, bins=1000, min=0, max=1).numpy()).pvalue > 1e-4
    # the low bits too: 24 bits, each set half of the time
    bits = (u * 2**24).long()
    for i in range(24):
        assert ((bits >> i) & 1).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(len(u)))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["draw", "row", "token"])
def test_neighbours_are_independent(axis):
    u = table()
    for lag in (1, 2, 4):
        n = u.shape[axis] - lag
        first, second = u.narrow(axis, 0, n).flatten(), u.narrow(axis, lag, n).flatten()
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(len(first))
        # jointly uniform, not only uncorrelated
        pairs = torch.bincount((first * 10).long() * 10 + (second * 10).long(), minlength=100)
        assert stats.chisquare(pairs.numpy()).pvalue > 1e-4


def test_no_two_identities_share_a_sequence():
    u = table(num_draws=500, group_size=16, num_tokens=4).flatten(0, 1)
    assert len({tuple(row) for row in u.tolist()}) == 8000
    # nor does a row repeat another one shifted by a token, as it would if d, g and t were merely added up
    assert torch.isin(u[:, 0], u[:, 1]).float().mean() < 0.01


def test_uniforms_repeat_and_do_not_depend_on_their_neighbours():
    keys = row_keys(7, TRAIN_STREAM, [3, 1, 3, 2], [0, 1, 2, 0])
    assert torch.equal(uniforms(keys, 5), uniforms(keys, 5))
    alone = uniforms(row_keys(7, TRAIN_STREAM, [3], [2]), 5)
    assert torch.equal(uniforms(keys, 5)[2:3], alone)


def test_uniforms_of_a_seed_never_change():
    # splitmix64 worked out in Python integers; a change here would change every run that is resumed
    mask = (1 << 64) - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed, stream, draw, row, token in [(0, 0, 0, 0, 0), (42, 0, 1000, 3, 511), (2**32, 1, 7, 15, 2)]:
        key = mix((mix((mix((mix(seed) + stream) & mask) + draw) & mask) + row) & mask)
        expected = (mix((key + token) & mask) >> 40) / 2**24
        assert uniforms(row_keys(seed, stream, [draw], [row]), token).item() == expected


def test_seeds_and_streams_differ():
    base, other_seed, other_stream = table(1), table(2), table(1, EVAL_STREAM)
    for other in (other_seed, other_stream):
        assert (base != other).float().mean() > 0.999
        both = torch.stack([base.flatten(), other.flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 5 / math.sqrt(base.numel())


def test_seeds_for_an_engine_differ_by_draw_and_stream():
    seeds = {params(stream=stream).seed_of(draw) for stream in (TRAIN_STREAM, EVAL_STREAM) for draw in (3, 4)}
    assert len(seeds) == 4


def test_u_is_below_one():
    u = table(num_draws=1000)
    assert u.min() >= 0
    assert u.max() <= LARGEST_U < 1
    assert u.dtype == torch.float32


def draws_of(scores, num=50_000):
    """How often each token is sampled from `scores` (V,), over the uniforms of `num` rows."""
    u = uniforms(row_keys(3, TRAIN_STREAM, list(range(num)), [0] * num), 0)
    tokens, logps = sample(scores.expand(num, -1), u)
    return tokens, logps


TRUNCATIONS = {
    "none": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "all": {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_samples_follow_the_processed_distribution(name):
    options = TRUNCATIONS[name]
    logits = LOGITS + torch.arange(8) * 1e-3  # no ties
    scores = warpers(params(**options))(torch.zeros(1, 0, dtype=torch.long), logits[None])[0]
    expected = reference_distribution(logits, **options)
    torch.testing.assert_close(scores.softmax(-1).double(), expected, rtol=1e-5, atol=1e-7)
    tokens, logps = draws_of(scores)
    counts = torch.bincount(tokens, minlength=8).double()
    kept = expected > 0
    assert kept.sum() == {"top_k": 3, "top_p": 3, "min_p": 2, "all": 5}.get(name, 8)
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept].numpy(), (expected[kept] * len(tokens)).numpy()).pvalue > 1e-4
    torch.testing.assert_close(logps.double(), expected[tokens].log(), rtol=0, atol=1e-5)


def reference_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=None):
    """The definitions, step by step: each rule keeps a set of tokens, and what is kept is renormalised."""
    p = (logits.double() / temperature).softmax(-1)
    if top_k:
        p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0)
        p = p / p.sum()
    if top_p < 1:
        ordered, index = p.sort(descending=True)
        mass_before = ordered.cumsum(0) - ordered
        p = torch.zeros_like(p).scatter(0, index, torch.where(mass_before < top_p, ordered, 0))
        p = p / p.sum()
    if min_p is not None:
        p = torch.where(p >= min_p * p.max(), p, 0)
        p = p / p.sum()
    return p


@pytest.mark.parametrize("u", [0.0, 2**-24, 0.5, LARGEST_U])
def test_tokens_of_probability_zero_are_never_drawn(u):
    inf = math.inf
    scores = torch.tensor(
        [
            [-inf, -inf, 1.0, -inf, 2.0, -inf, -inf, -inf],  # excluded at both ends and between
            [-inf, 0.0, -inf, -inf, -inf, -inf, -inf, -inf],  # a single token is left
            [-inf, -inf, -inf, -inf, -inf, -inf, -inf, 0.0],
            [0.0, -inf, -inf, -inf, -inf, -inf, -inf, -inf],
            [-200.0, 0.0, -200.0, 0.0, 0.0, 0.0, 0.0, -200.0],  # 0 after the softmax in fp32
        ]
    )
    tokens, logps = sample(scores, torch.full((5,), u))
    probs = scores.softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (probs > 0).all()
    assert logps.isfinite().all()
    assert tokens[1:4].tolist() == [1, 7, 0]


def test_extremes_of_u_over_a_large_vocabulary():
    # the fp32 sum over 150,000 tokens is not exactly 1; no index may fall behind the last token
    scores = torch.randn(4, 150_000, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, -1000:] = -math.inf
    for u in (0.0, LARGEST_U):
        tokens, logps = sample(scores, torch.full((4,), u))
        assert (tokens < 149_000).all()
        torch.testing.assert_close(logps, scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_u_is_the_position_in_the_cdf():
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    for u, token in [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.9, 3), (LARGEST_U, 3)]:
        assert sample(scores, torch.tensor([u]))[0].item() == token


@pytest.mark.parametrize(
    ("tokens", "probability", "u", "expected"),
    [
        ((130, 300), 0.5, 0.0, 130),  # of three blocks of 128, the first has no probability
        ((130, 300), 0.5, 0.5, 300),
        ((130, 140), 0.25, 0.4, 130),  # probabilities that do not sum to 1
        ((130, 140), 0.25, LARGEST_U, 140),
    ],
)
def test_u_is_the_position_in_blocks_too(tokens, probability, u, expected):
    probs = torch.zeros(1, 384)
    probs[0, list(tokens)] = probability
    assert inverse_cdf(probs, torch.tensor([u])).item() == expected


def test_greedy_takes_the_most_likely_token():
    scores = torch.stack([LOGITS, LOGITS.flip(0)])
    for u in (0.0, LARGEST_U):
        tokens, logps = sample(scores, torch.full((2,), u), greedy=True)
        assert tokens.tolist() == [0, 7]
        torch.testing.assert_close(logps, scores.log_softmax(-1).max(-1).values)


def test_warpers_are_those_that_are_asked_for():
    assert len(warpers(params())) == 0
    assert len(warpers(params(temperature=0.0))) == 0  # greedy: the logits are not divided by 0
    chosen = warpers(params(temperature=0.6, top_k=20, top_p=0.95, min_p=0.05))
    assert [type(warper) for warper in chosen[1:]] == [TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper]


def test_own_processors_come_before_the_repetition_penalty():
    plus_one = lambda ids, scores: scores + 1  # noqa: E731
    processors = params(repetition_penalty=2.0, logits_processors=(plus_one,)).history_processors
    assert processors(torch.tensor([[0]]), torch.tensor([[3.0, 3.0]])).tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize(
    ("options", "truncates"),
    [
        ({}, False),
        ({"temperature": 0.5}, False),
        ({"min_p": 0.0}, False),
        ({"top_p": 0.95}, True),
        ({"top_k": 50}, True),
        ({"top_k": 1}, True),
        ({"min_p": 0.05}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
)
def test_truncates(options, truncates):
    assert params(**options).truncates is truncates
