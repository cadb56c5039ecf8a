import pytest
import torch

from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.policy.packing import num_tokens, pack, pad, pieces

# the pad id is a token like any other here: only masks may tell what is padding
GROUPS = [
    Group(Prompt([1, 2, 3], {}, draw=7), [[11, 12], [13]], [True, True]),
    Group(Prompt([4], {}, draw=3), [[14, 15, 0], [0]], [True, True]),
]


def batch_of(groups=GROUPS):
    return RolloutBatch.from_groups(groups, pad_token_id=0)


def test_a_stream_by_hand():
    stream = pack(batch_of())
    # shared: [1 2], []; branches: [3 11] [3], [4 14 15] [4]
    assert stream.inputs["input_ids"].tolist() == [[1, 2, 3, 11, 3, 4, 14, 15, 4]]
    assert stream.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 0]]
    layout = stream.inputs["layout"]
    assert layout.shared == [slice(0, 2), slice(2, 2)]
    assert layout.branches == [[slice(2, 4), slice(4, 5)], [slice(5, 8), slice(8, 9)]]
    assert stream.inputs["input_ids"][0][stream.scored].tolist() == [3, 11, 3, 4, 14, 15, 4]
    assert stream.labels.tolist() == [11, 12, 13, 14, 15, 0, 0]
    assert stream.rows(torch.arange(1.0, 8.0)).tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 0, 0]]


def test_padded_rows_by_hand():
    stream = pad(batch_of())
    assert stream.inputs["input_ids"].tolist() == [
        [1, 2, 3, 11, 12, 0],
        [1, 2, 3, 13, 0, 0],
        [0, 0, 4, 14, 15, 0],
        [0, 0, 4, 0, 0, 0],
    ]
    assert stream.inputs["position_ids"][2].tolist() == [0, 0, 0, 1, 2, 3]
    # the token before each label
    assert stream.inputs["input_ids"].flatten()[stream.scored].tolist() == [3, 11, 3, 4, 14, 15, 4]
    assert torch.equal(stream.labels, pack(batch_of()).labels)


def test_rows_in_any_order():
    batch = batch_of()
    stream = pack(batch.rows([3, 0, 1, 2]))  # the rows of the second group are no longer neighbours
    assert stream.inputs["input_ids"].tolist() == [[1, 2, 4, 3, 11, 3, 4, 14, 15]]
    assert len(stream.inputs["layout"].shared) == 3


def test_two_draws_of_one_prompt_are_two_groups():
    groups = [Group(Prompt([1, 2, 3], {}, draw=d), [[11], [12]], [True, True]) for d in (0, 1)]
    assert pack(batch_of(groups)).inputs["input_ids"].shape == (1, 2 * (2 + 2))


def test_completions_without_a_token():
    empty = [Group(Prompt([5], {}, draw=0), [[], []], [False, False])]
    stream = pack(batch_of(empty))
    assert stream.inputs["input_ids"].tolist() == [[5]] and len(stream.labels) == 0
    assert stream.rows(torch.zeros(0)).tolist() == [[0.0], [0.0]]
    some = [Group(Prompt([5, 6], {}, draw=0), [[], [7]], [False, True])]
    assert pack(batch_of(some)).inputs["input_ids"].tolist() == [[5, 6]]


def test_saved_tokens():
    prompt, completions = list(range(100)), [list(range(n)) for n in (5, 10, 40, 20)]
    batch = batch_of([Group(Prompt(prompt, {}, 0), completions, [True] * 4)])
    assert pack(batch).inputs["input_ids"].numel() == 99 + 75
    assert pad(batch).inputs["input_ids"].numel() == 4 * 140
    assert (num_tokens(batch, packed=True), num_tokens(batch, packed=False)) == (99 + 75, 4 * 140)


# ---- Pieces ----


def lengths_batch(*groups):
    """(prompt length, completion lengths) of each group."""
    return batch_of(
        [Group(Prompt([1] * p, {}, i), [[2] * c for c in cs], [True] * len(cs)) for i, (p, cs) in enumerate(groups)]
    )


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (None, [(0, 6)]),
        (100, [(0, 6)]),
        (25, [(0, 4), (4, 6)]),  # groups of 4+5+3 = 12, 12 and 4+20+1 = 25 tokens
        (24, [(0, 4), (4, 5), (5, 6)]),
        (12, [(0, 2), (2, 4), (4, 5), (5, 6)]),  # the last group is torn; its first row has more than 12 by itself
        (11, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),
        (1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]),
    ],
)
def test_pieces_by_hand(max_tokens, expected):
    batch = lengths_batch((5, [5, 3]), (5, [5, 3]), (5, [20, 1]))
    assert [(s.start, s.stop) for s in pieces(batch, max_tokens, packed=True)] == expected


def test_what_is_left_of_a_torn_group_is_filled_up():
    batch = lengths_batch((5, [9, 9, 2]), (3, [1, 1]))  # 4+20, 2+2
    assert [(s.start, s.stop) for s in pieces(batch, 14, packed=True)] == [(0, 1), (1, 2), (2, 5)]


def test_pieces_are_as_full_as_they_may_be():
    groups, rows = lengths_batch(*[(5, [5, 3])] * 4), lengths_batch((5, [5, 5, 5]))
    assert [(s.start, s.stop) for s in pieces(groups, 24, packed=True)] == [(0, 4), (4, 8)]  # 12 tokens each
    assert [(s.start, s.stop) for s in pieces(rows, 14, packed=True)] == [(0, 2), (2, 3)]  # 4+5+5


def test_pieces_hold_their_tokens():
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    batch = lengths_batch(*[(draw(1, 30), [draw(1, 40) for _ in range(draw(1, 9))]) for _ in range(20)])
    for max_tokens in (30, 64, 100, 300):
        found = pieces(batch, max_tokens, packed=True)
        assert [row for piece in found for row in range(piece.start, piece.stop)] == list(range(len(batch)))
        for piece in found:
            tokens = pack(batch.rows(piece)).inputs["input_ids"].numel()
            assert tokens <= max_tokens or piece.stop - piece.start == 1
    assert [(s.start, s.stop) for s in pieces(lengths_batch((5, [5, 3, 1])), 20, packed=False)] == [(0, 2), (2, 3)]
