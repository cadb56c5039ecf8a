"""Which tokens have the highest entropy, and the bonus, where ranks and micro-batches differ."""

import torch

from grpo_trl.algorithm import entropy_bonus, top_entropy_mask

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_without_a_token_to_count_there_is_none_of_high_entropy():
    assert not top_entropy_mask(torch.rand(2, 4), torch.zeros(2, 4), 0.2).any()


def test_tokens_of_equal_entropy_are_all_chosen():
    assert torch.equal(top_entropy_mask(torch.ones(2, 4), MASK, 0.2), MASK.bool())


def test_the_quantile_is_that_of_all_ranks():
    """The highest fifth of (0, 1, 2, 3, 4) here and (5, ..., 9) there begins at 7.2: there, and not here."""
    entropies = torch.tensor([[0.0, 1, 2, 99], [3, 4, 99, 99]])
    assert top_entropy_mask(entropies, MASK, 0.2).sum() == 1
    assert not top_entropy_mask(entropies, MASK, 0.2, lambda mine: torch.cat([mine, mine + 5])).any()


def test_the_share_of_the_bonus_is_that_of_all_ranks():
    """Two of five tokens here, one of five there: ten tokens of weight 1 / 10 each make three of weight 1 / 3."""
    entropies, weights = torch.full((2, 4), 2.0), MASK / 10
    chosen = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    both = entropy_bonus(entropies, weights, MASK, chosen, lambda counts: counts + torch.tensor([1, 5]))
    torch.testing.assert_close(both, torch.tensor(2 * 2 / 3))
    torch.testing.assert_close(entropy_bonus(entropies, weights, MASK), torch.tensor(1.0))
