"""Passes of at most so many tokens, and of fewer once memory ran out."""

import logging

import pytest
import torch

from grpo_trl import token_limit
from grpo_trl.token_limit import TokenLimit, is_out_of_memory, token_batches

ROWS = [3, 9, 1, 4]


def cut(tokens):
    return token_batches([(row,) for row in ROWS], tokens or 99)


def memory_for(most, sizes):
    """Work that fails on a pass of more than `most` tokens; `sizes` gets those that it makes."""

    def work(limit):
        for rows in cut(limit.tokens):
            sizes.append(len(rows) * max(ROWS[row] for row in rows))
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return "done"

    return work


def test_batches_by_hand():
    assert token_batches([(3,), (9,), (1,), (4,)], 10) == [[1], [3, 0], [2]]
    assert token_batches([(3,), (9,), (1,), (4,)], 12) == [[1], [3, 0, 2]]
    assert token_batches([(3,), (9,), (1,), (4,)], 1) == [[1], [3], [0], [2]]  # a row is never cut
    assert token_batches([(2, 2), (2, 2)], 8) == [[0, 1]]
    assert token_batches([(3, 1), (1, 3)], 8) == [[0], [1]]  # side by side they have 3 + 3 columns
    assert token_batches([(6, 1), (1, 5), (3, 1)], 22) == [[0, 1], [2]]  # all three would have 6 + 5 columns too
    assert token_batches([], 8) == []


def test_memory_that_runs_out_lowers_the_limit_for_good_and_is_said(caplog):
    limit, sizes = TokenLimit("the reference"), []
    work = memory_for(10, sizes)
    with caplog.at_level(logging.WARNING, "grpo_trl"):
        assert limit.run(lambda: work(limit), cut) == "done"
    assert sizes == [36, 27, 9, 12, 9, 8, 1]  # with 32, 16 and 8 tokens
    assert limit.tokens == 8
    assert "Out of memory in the reference: its passes have at most 8 tokens from here on." in caplog.messages
    sizes.clear()
    limit.run(lambda: work(limit), cut)
    assert sizes == [9, 8, 1]


def test_what_a_failed_attempt_left_is_undone_before_each_other(monkeypatch):
    limit, sizes, restarts, freed = TokenLimit("it"), [], [], []
    monkeypatch.setattr(token_limit, "clear_device_cache", lambda garbage_collection: freed.append(len(sizes)))
    work = memory_for(10, sizes)
    limit.run(lambda: work(limit), cut, restart=lambda: restarts.append(len(sizes)))
    assert restarts == freed == [1, 2, 4]


@pytest.mark.parametrize(
    ("kept", "expected"), [(True, [36, 36, 27, 9, 12, 9, 8, 1]), (False, [36, 27, 9, 12, 9, 8, 1])]
)
def test_kept_memory_is_given_up_first_and_once(kept, expected):
    limit, sizes, asked = TokenLimit("it", release=lambda: asked.append(1) or kept), [], []
    work = memory_for(10, sizes)
    limit.run(lambda: work(limit), cut)
    assert sizes == expected and asked == [1]


@pytest.mark.parametrize("fixed", [False, True])
def test_what_cannot_be_cut_fails_with_the_error_itself(fixed):
    limit, sizes = TokenLimit("it", fixed=fixed), []
    work = memory_for(8, sizes)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        limit.run(lambda: work(limit), cut)
    assert (sizes[-1], limit.tokens) == ((36, None) if fixed else (9, 4))


def test_other_errors_pass():
    def fail():
        raise RuntimeError("shapes differ")

    limit = TokenLimit("it")
    with pytest.raises(RuntimeError, match="shapes differ"):
        limit.run(fail, cut)
    assert limit.tokens is None


def test_out_of_memory_is_told_by_its_words_too():
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(torch.OutOfMemoryError("any words"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("the judge is out of memory"))
