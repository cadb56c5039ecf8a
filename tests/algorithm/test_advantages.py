import itertools
import math

import pytest
import torch

from grpo_trl.algorithm import AGGREGATIONS, combine_rewards, group_advantages, informative_groups, passed
from grpo_trl.algorithm.advantages import SCALE_REWARDS

NAN = math.nan
# Two prompts, G = 2: group means .5 and 2, relative rewards +-.5 and +-1.
TWO_GROUPS = torch.tensor([1.0, 0.0, 3.0, 1.0])
RELATIVE = torch.tensor([0.5, -0.5, 1.0, -1.0])


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected), atol=tolerance, rtol=0)


def test_a_function_without_weight_gives_no_reward():
    rewards, weights = torch.tensor([[NAN, 3.0], [1.0, 3.0], [2.0, NAN]]), torch.tensor([1.0, 0.0])
    expected = torch.tensor([NAN, 1.0, 2.0])
    torch.testing.assert_close(combine_rewards(rewards, weights), expected, equal_nan=True)
    verdicts = torch.tensor([NAN, 0.0, 1.0])
    torch.testing.assert_close(passed(rewards, weights, 1.5), verdicts, equal_nan=True)
    decoupled = AGGREGATIONS["normalize_then_sum"](rewards, weights, 3)
    assert decoupled.isnan().tolist() == [True, False, False]


def test_none_is_reward_minus_group_mean():
    assert_close(group_advantages(torch.tensor([1.0, 0, 0, 0]), 4, "none"), [0.75, -0.25, -0.25, -0.25])


def test_group_divides_by_the_sample_std_of_the_group():
    # squares .5625 + 3 x .0625 = .75; / (4 - 1) = .25; std .5 (the population std would be .433)
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / 0.5001
    assert_close(group_advantages(torch.tensor([1.0, 0, 0, 0]), 4, "group"), expected)


def test_batch_divides_by_the_std_of_the_raw_rewards():
    # mean 1.25; squares .0625 + 1.5625 + 3.0625 + .0625 = 4.75; / 3 = 1.58333
    assert_close(group_advantages(TWO_GROUPS, 2, "batch"), RELATIVE / (math.sqrt(4.75 / 3) + 1e-4))


def test_batch_relative_divides_by_the_std_of_the_relative_rewards():
    # mean 0; squares .25 + .25 + 1 + 1 = 2.5; / 3 = .83333
    expected = RELATIVE / (math.sqrt(2.5 / 3) + 1e-4)
    assert_close(group_advantages(TWO_GROUPS, 2, "batch_relative"), expected)
    assert_close(group_advantages(TWO_GROUPS, 2), expected)  # the default


def test_batch_relative_ignores_how_hard_prompts_are():
    easy_and_hard = TWO_GROUPS + torch.tensor([100.0, 100, 0, 0])
    assert_close(group_advantages(easy_and_hard, 2), group_advantages(TWO_GROUPS, 2))
    assert group_advantages(easy_and_hard, 2, "batch").abs().max() < 0.02


@pytest.mark.parametrize("num_generations", [2, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_trl_formulas(num_generations, seed):
    rewards = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    exact = rewards.double()  # TRL computes in fp32; its own rounding, 3e-6 in small groups, is not what is tested
    groups = exact.view(-1, num_generations)
    relative = exact - groups.mean(1).repeat_interleave(num_generations)
    std = {
        "none": torch.tensor(1 - 1e-4, dtype=torch.float64),
        "group": groups.std(1).repeat_interleave(num_generations),
        "batch": exact.std(),
    }
    for scale_rewards, value in std.items():
        assert_close(group_advantages(rewards, num_generations, scale_rewards), (relative / (value + 1e-4)).float())


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
@pytest.mark.parametrize("num_generations", [3, 4, 16])
@pytest.mark.parametrize("reward", [0.1, 0.35, 0.7, 0.95, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # in fp64, three times 0.1 has a mean above 0.1
def test_equal_rewards_give_exactly_zero(dtype, reward, num_generations, scale_rewards):
    alone = torch.full((num_generations,), reward, dtype=dtype)
    assert group_advantages(alone, num_generations, scale_rewards).eq(0).all()
    beside_another = torch.cat([alone, torch.arange(num_generations) ** 2])
    advantages = group_advantages(beside_another, num_generations, scale_rewards)
    assert advantages[:num_generations].eq(0).all()
    assert advantages[num_generations:].ne(0).all()


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
def test_smallest_group(scale_rewards):
    better, worse = group_advantages(torch.tensor([0.9, 0.2]), 2, scale_rewards)
    # relative +-.35; std of (.9, .2) and of (.35, -.35) is .7 / sqrt(2)
    expected = 0.35 if scale_rewards == "none" else 0.35 / (0.7 / math.sqrt(2) + 1e-4)
    assert_close(torch.stack([better, worse]), [expected, -expected])


@pytest.mark.parametrize("function", [group_advantages, informative_groups])
def test_refuses_a_group_of_one_and_broken_groups(function):
    with pytest.raises(ValueError, match="num_generations=1: a group needs at least 2"):
        function(torch.ones(4), 1)
    with pytest.raises(ValueError, match="6 rewards are not whole groups of num_generations=4"):
        function(torch.ones(6), 4)


def test_refuses_an_unknown_scale():
    with pytest.raises(ValueError, match="scale_rewards='batches' is unknown; use one of batch_relative, group"):
        group_advantages(torch.ones(4), 4, "batches")


def test_missing_reward_gets_zero_and_does_not_move_the_mean():
    assert_close(group_advantages(torch.tensor([1.0, NAN, 0, 0]), 4, "none"), [2 / 3, 0, -1 / 3, -1 / 3])


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
def test_missing_rewards_are_in_no_statistic(scale_rewards):
    # the rows that have a reward get what they would get in batches without the others
    rewards = torch.tensor([1.0, 0.0, NAN, 4.0, NAN, 2.0])
    without = torch.tensor([1.0, 0.0, 4.0, 2.0])
    advantages = group_advantages(rewards, 3, scale_rewards)
    assert_close(advantages[[0, 1, 3, 5]], group_advantages(without, 2, scale_rewards))
    assert advantages[[2, 4]].eq(0).all()


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
@pytest.mark.parametrize("rows", [[NAN] * 4, [NAN, NAN, 0.7, NAN]])
def test_group_without_anything_to_compare(rows, scale_rewards):
    assert group_advantages(torch.tensor(rows), 4, scale_rewards).eq(0).all()
    beside_another = group_advantages(torch.tensor([*rows, 1.0, 0, 0, 0]), 4, scale_rewards)
    assert beside_another[:4].eq(0).all()
    assert beside_another[4:].isfinite().all() and beside_another[4] > 0
    assert informative_groups(torch.tensor([*rows, 1.0, 0, 0, 0]), 4).tolist() == [False, True]


def test_informative_groups():
    rewards = torch.cat([torch.full((16,), 0.7), torch.full((16,), 0.95), torch.arange(16) / 16])
    assert informative_groups(rewards, 16).tolist() == [False, False, True]
    assert informative_groups(torch.tensor(5 * [0.1] + [0.2], dtype=torch.float64), 3).tolist() == [False, True]


def test_a_tolerance_is_a_share_of_the_largest_reward_by_size():
    penalties = torch.tensor([-10.0, -8.0, -9.0, -0.5, 0.0, NAN])
    assert informative_groups(penalties, 3, tolerance=0.25).tolist() == [False, True]


def test_a_right_answer_under_a_penalty_passes():
    right, half, wrong, long, unknown = 1.0, 0.5, 0.0, -1.0, NAN
    rewards = torch.tensor([[right, 0], [right, long], [half, long], [wrong, 0], [unknown, long], [unknown, unknown]])
    verdicts = [passed(rewards, torch.tensor(weights), threshold=1.0) for weights in ([1.0, 1.0], [2.0, 0.5])]
    assert [verdict[:5].tolist() for verdict in verdicts] == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert all(verdict[5].isnan() for verdict in verdicts)


def test_what_is_a_penalty_is_seen_after_the_weights():
    right_but_long, penalty_twice_negative = [1.0, 5.0], [0.0, -5.0]
    verdicts = passed(torch.tensor([right_but_long, penalty_twice_negative]), torch.tensor([1.0, -0.1]), threshold=0.5)
    assert verdicts.tolist() == [1, 1]


def test_rewards_at_the_threshold_pass():
    assert passed(torch.tensor([[0.7], [0.6999]]), torch.ones(1), threshold=0.7).tolist() == [1, 0]


def test_missing_rewards_do_not_make_a_group_uninformative():
    assert informative_groups(torch.tensor([1.0, NAN, 0, 0, 1.0, NAN, 1, 1]), 4).tolist() == [True, False]


def test_one_different_completion_keeps_the_whole_group():
    rewards = torch.tensor([0.0] + 7 * [0.95])
    assert informative_groups(rewards, 8).tolist() == [True]
    assert group_advantages(rewards, 8, "group").ne(0).all()


def test_combine_rewards():
    rewards_per_func = torch.tensor([[1.0, 0.5], [NAN, 0.5], [1.0, NAN], [NAN, NAN]])
    combined = combine_rewards(rewards_per_func, torch.tensor([2.0, 10.0]))
    torch.testing.assert_close(combined, torch.tensor([7.0, 5.0, 2.0, NAN]), equal_nan=True)


def test_equal_rows_stay_equal_when_combined():
    combined = combine_rewards(torch.tensor([0.1, 0.35, 0.7]).repeat(16, 1), torch.tensor([1 / 3, 0.9, 0.45]))
    assert informative_groups(combined, 16).tolist() == [False]


def test_equal_totals_of_different_parts_are_equal():
    """As fp32, .6 + .1 is more than .7 + 0."""
    tenths = [step / 10 for step in range(11)]
    for total in tenths:
        pairs = [(a, b) for a in tenths for b in tenths if abs(a + b - total) < 1e-9]
        combined = combine_rewards(torch.tensor(pairs, dtype=torch.float64), torch.ones(2))
        assert combined.dtype == torch.float32 and len(combined.unique()) == 1, pairs


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_order_of_the_functions_does_not_matter(weight):
    """In fp32 the six orders of (.1, .2, .4) have two different sums, which would be scaled up to advantages."""
    tenths = [step / 10 for step in range(11)]
    rows = [list(itertools.permutations(triple)) for triple in itertools.combinations_with_replacement(tenths, 3)]
    combined = combine_rewards(torch.tensor(rows).flatten(0, 1), torch.full((3,), weight))
    assert combined.dtype == torch.float32
    assert not informative_groups(combined, 6).any()
    assert not group_advantages(combined, 6, "group").any()


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
def test_order_is_kept(scale_rewards):
    # three prompts of very different difficulty: a row compared with another prompt's rows would be off by 100
    rewards = torch.tensor([1.0, 0, 0, 0, 102, 101, 100, 100, 200, 200, 201, 201])
    advantages = group_advantages(rewards, 4, scale_rewards)
    assert advantages.sign().tolist() == [1, -1, -1, -1, 1, 1, -1, -1, -1, -1, 1, 1]
    order = torch.tensor([2, 0, 1])
    swapped = group_advantages(rewards.view(3, 4)[order].flatten(), 4, scale_rewards)
    assert_close(swapped, advantages.view(3, 4)[order].flatten())


def test_interleaved_prompts_sorted_into_groups_and_back():
    # rows arrive as prompt 0, 1, 2, 0, 1, 2, ...; groups are made contiguous, and results put back
    interleaved = torch.tensor([1.0, 102, 200, 0, 101, 200, 0, 100, 201, 0, 100, 201])
    to_groups = torch.arange(12).view(4, 3).T.flatten()
    advantages = torch.empty(12)
    advantages[to_groups] = group_advantages(interleaved[to_groups], 4, "none")
    assert_close(advantages, [0.75, 1.25, -0.5, -0.25, 0.25, -0.5, -0.25, -0.75, 0.5, -0.25, -0.75, 0.5])


# --- the family ------------------------------------------------------------------------------------------------------


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.25, 0.0])
    advantages = group_advantages(rewards, 4, "none", baseline="leave_one_out")
    for i, reward in enumerate(rewards):
        group = slice(i // 4 * 4, i // 4 * 4 + 4)
        others = (rewards[group].sum() - reward) / 3
        assert advantages[i] == pytest.approx((reward - others).item(), abs=1e-6)


def test_leave_one_out_counts_the_rewards_that_are_there():
    rewards = torch.tensor([1.0, 0.0, torch.nan, 0.0, torch.nan, torch.nan, torch.nan, 1.0])
    advantages = group_advantages(rewards, 4, "none", baseline="leave_one_out")
    assert advantages.tolist() == pytest.approx([1.0, -0.5, 0.0, -0.5, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="baseline='median' is unknown; use one of group_mean, leave_one_out"):
        group_advantages(rewards, 4, baseline="median")


def test_normalised_by_function_a_wide_reward_does_not_drown_a_narrow_one():
    narrow, wide = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 100.0, 100.0])
    rewards = torch.stack([narrow, wide], dim=1)
    weights = torch.ones(2)
    summed = AGGREGATIONS["sum_then_normalize"](rewards, weights, 4)
    decoupled = AGGREGATIONS["normalize_then_sum"](rewards, weights, 4)
    assert summed.tolist() == [1.0, 0.0, 101.0, 100.0]
    std = 1 / math.sqrt(3)  # of four values, two at each end of an interval of length 1
    expected = (
        0.5 / (std + 1e-4)
        + torch.tensor([-1, -1, 1, 1]) * 50 / (100 * std + 1e-4)
        - torch.tensor([0, 1, 0, 1]) / (std + 1e-4)
    )
    assert torch.allclose(decoupled, expected.float(), atol=1e-5)
    assert decoupled[0] > decoupled[1] and decoupled[0] == pytest.approx(0, abs=1e-2)


def test_normalised_by_function_is_trls():
    """`normalize_then_sum` of TRL 1.16, written out; where every function applies to every completion."""
    rewards, weights = torch.rand(12, 3), torch.tensor([1.0, 0.5, 2.0])
    grouped = rewards.view(3, 4, 3)
    normalised = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    total = (normalised.view(12, 3) * weights).sum(1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    ours = group_advantages(AGGREGATIONS["normalize_then_sum"](rewards, weights, 4), 4, "batch_relative")
    assert torch.allclose(ours, expected, atol=1e-5)


def test_normalised_by_function_leaves_out_what_does_not_apply():
    rewards = torch.tensor([[1.0, torch.nan], [0.0, torch.nan], [torch.nan, torch.nan], [1.0, 5.0]])
    decoupled = AGGREGATIONS["normalize_then_sum"](rewards, torch.ones(2), 4)
    assert decoupled.isnan().tolist() == [False, False, True, False]
    assert decoupled[0] == decoupled[3] > decoupled[1]  # a single value is compared with nothing: 0
