"""Dynamic sampling without a model: which groups make a batch, what it costs, and that ranks do not matter."""

import json
import threading
from dataclasses import asdict
from itertools import zip_longest

import pytest
import torch

from grpo_trl.algorithm import group_advantages, informative_groups, token_weights
from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.rollouts.dynamic import Cost, DynamicSampler, Scored, blank, distribute


def is_informative(scored):
    return len(set(scored.rewards)) > 1


def sampler(**options):
    options = {"max_rounds": 10, "max_age": 1} | options
    return DynamicSampler(is_informative, **options)


class World:
    """Prompts with a fate: "i" informative, "r" all right, "w" all wrong, by their draw; ranks that are threads."""

    def __init__(self, fates, world_size=1):
        self.fates, self.world_size = fates, world_size
        self.barrier = threading.Barrier(world_size)
        self.box = [None] * world_size

    def rank(self, number):
        return Rank(self, number)


class Rank:
    def __init__(self, world, number):
        self.world, self.number, self.drawn, self.rounds = world, number, 0, []

    def gather(self, values):
        self.world.box[self.number] = values
        self.world.barrier.wait(timeout=10)
        result = [value for part in self.world.box for value in part]
        self.world.barrier.wait(timeout=10)
        return result

    def sampled_at(self, step):
        def sample(count):
            start, self.drawn = self.drawn, self.drawn + count
            self.rounds.append(count)
            draws = range(start + self.number, start + count, self.world.world_size)
            return [self.scored(draw, step) for draw in draws]

        return sample

    def scored(self, draw, step):
        rewards = {"i": [0.0, 1.0], "r": [1.0, 1.0], "w": [0.0, 0.0]}[self.world.fates[draw % len(self.world.fates)]]
        group = Group(
            Prompt([5, draw + 10], {"prompt": "?"}, draw), [[7, 8], [9]], [True, False], [[-1.0, -0.5], [-2.0]]
        )
        return Scored(group, rewards, step, solved=rewards == [1.0, 1.0])


def draws(scored):
    return [one.group.prompt.draw for one in scored]


def fill(made, rank, wanted, step=0):
    return made.fill(wanted, step, rank.sampled_at(step), rank.gather, rank.world.world_size)


def on_ranks(world_size, work):
    threads = [threading.Thread(target=work, args=(number,)) for number in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_has_no_gradient_is_replaced():
    made, rank = sampler(), World("iwri").rank(0)
    chosen, cost = fill(made, rank, 4)
    assert draws(chosen) == [0, 3, 4, 7] and rank.rounds == [4, 4]  # half of the first four, so twice what is missing
    assert cost == Cost(drawn=8, kept=4, all_right=2, all_wrong=2, rounds=2, tokens=24, trained_tokens=12)


def test_surplus_is_used_next_while_it_is_recent():
    made, rank = sampler(max_age=2), World("wwiiiiii").rank(0)
    chosen, cost = fill(made, rank, 4)
    assert draws(chosen) == [2, 3, 4, 5] and cost.carried == 0
    assert draws(made.surplus) == [6, 7] or not made.surplus
    carried = draws(made.surplus)
    chosen, cost = fill(made, rank, 4, step=2)
    assert draws(chosen)[: len(carried)] == carried and cost.carried == len(carried) and cost.expired == 0
    made.surplus = [rank.scored(2, step=2)]
    chosen, cost = fill(made, rank, 2, step=5)
    assert 2 not in draws(chosen) and cost.expired == 1 and cost.carried == 0


@pytest.mark.parametrize("options", [{"max_age": 0}, {}])
def test_surplus_that_cannot_be_used_is_not_kept(options):
    made, rank = sampler(round_size=8, **options), World("i").rank(0)
    if not options:  # log-probabilities of sampling are needed for the ratio

        def bare(draw, step, scored=rank.scored):
            one = scored(draw, step)
            one.group.sampling_per_token_logps = None
            return one

        rank.scored = bare
    chosen, _ = fill(made, rank, 4)
    assert draws(chosen) == [0, 1, 2, 3] and made.surplus == [] and rank.rounds == [8]


def test_the_bound_leaves_what_was_found():
    made, rank = sampler(max_rounds=3), World("wwwwwwwwwi").rank(0)
    chosen, cost = fill(made, rank, 4)
    assert cost.rounds == 3 and 0 < cost.kept == len(chosen) < 4
    made, rank = sampler(max_rounds=2), World("r").rank(0)
    chosen, cost = fill(made, rank, 4)
    assert chosen == [] and (cost.kept, cost.all_right, cost.rounds) == (0, cost.drawn, 2)


def test_rounds_follow_the_acceptance_rate():
    made, rank = sampler(), World("iwww").rank(0)
    fill(made, rank, 8)
    first = list(rank.rounds)
    assert first[0] == 8 and first[1] == 4 * 6  # a quarter of eight; fourfold at most
    rank.rounds.clear()
    fill(made, rank, 8, step=1)
    assert rank.rounds[0] > 8  # the next batch begins with what it will need
    made = sampler(round_size=16)
    rank.rounds.clear()
    fill(made, rank, 2)
    assert rank.rounds[0] == 16  # what the engine decodes at a time anyway


def test_the_acceptance_rate_is_that_of_the_prompts():
    made, rank = sampler(), World("iwww").rank(0)
    for step in range(6):
        fill(made, rank, 8, step)
    assert made.accepted / made.drawn == pytest.approx(0.25)


def run_ranks(fates, world_size, wanted, steps, batches):
    """What each optimizer step is made of, over all ranks: [batch][step] -> draws, and each rank's share."""
    world = World(fates, world_size)
    results = [[] for _ in range(world_size)]

    def work(number):
        rank, made = world.rank(number), sampler(max_age=3)
        for step in range(batches):
            chosen, cost = fill(made, rank, wanted, step)
            parts = distribute(chosen, steps=steps, rank=number, world_size=world_size, gather=rank.gather)
            results[number].append((parts, asdict(cost)))

    on_ranks(world_size, work)
    # place p of a step is place p // ranks of rank p % ranks
    made_of = [
        [
            [draw for places in zip_longest(*(draws(rank[batch][0][step]) for rank in results)) for draw in places]
            for step in range(steps)
        ]
        for batch in range(batches)
    ]
    made_of = [[[draw for draw in step if draw is not None] for step in batch] for batch in made_of]
    shares = [[len(part) for part in rank[batch][0]] for rank in results for batch in range(batches)]
    return made_of, shares, [cost for _, cost in results[0]]


@pytest.mark.parametrize("fates", ["iw", "i", "iiiiwwww", "iiiwwwww", "iwrwiiiw", "wwww"])
def test_steps_are_the_same_for_any_number_of_ranks(fates):
    """With "iw" and two ranks, one has all the luck."""
    one = run_ranks(fates, 1, wanted=8, steps=2, batches=3)
    for world_size in (2, 4):
        more = run_ranks(fates, world_size, wanted=8, steps=2, batches=3)
        assert more[0] == one[0] and more[2] == one[2]
        full = 8 // 2 // world_size
        assert all(share == full for part in more[1] for share in part) or "i" not in fates
    assert all(len(step) == 4 for batch in one[0] for step in batch) or "i" not in fates


def test_what_expired_is_counted_on_all_ranks():
    world, expired = World("i", world_size=2), [None, None]

    def work(number):
        rank, made = world.rank(number), sampler()
        made.surplus = [rank.scored(draw, step=0) for draw in ((), (2, 4))[number]]
        expired[number] = fill(made, rank, 4, step=5)[1].expired

    on_ranks(2, work)
    assert expired == [2, 2]


def test_a_batch_that_is_not_full_is_spread_over_its_steps():
    rank = World("i").rank(0)
    chosen = [rank.scored(draw, 0) for draw in (3, 1, 2)]
    parts = distribute(chosen, steps=4, rank=0, world_size=1, gather=rank.gather)
    assert [draws(part) for part in parts] == [[1], [2], [3], []]


def test_state_is_numbers_and_comes_back():
    made, rank = sampler(round_size=8), World("i").rank(0)
    fill(made, rank, 4)
    made.surplus[0].group.loss_masks = [[1, 0], [1]]
    again = sampler(round_size=8)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert draws(again.surplus) == draws(made.surplus) == [4, 5, 6, 7]
    assert again.surplus[0].group.sampling_per_token_logps == made.surplus[0].group.sampling_per_token_logps
    assert again.surplus[0].group.loss_masks == [[1, 0], [1]]
    assert (again.accepted, again.drawn) == (made.accepted, made.drawn)
    assert again.state_dict() == made.state_dict()


def test_blank_places_are_in_no_sum_and_no_count():
    rank = World("i").rank(0)
    groups = [rank.scored(0, 0).group, blank(2, pad_token_id=0)]
    rewards = torch.tensor([0.0, 1.0, torch.nan, torch.nan])
    for scale in ("batch_relative", "batch", "group"):
        alone = group_advantages(rewards[:2], 2, scale)
        assert group_advantages(rewards, 2, scale).tolist() == [*alone.tolist(), 0.0, 0.0]
    for weighting in ("token", "sequence", "max_length"):
        masks = [RolloutBatch.from_groups(part, pad_token_id=0).loss_mask for part in (groups, groups[:1])]
        with_blank, alone = (token_weights(mask, weighting, max_completion_length=4) for mask in masks)
        assert torch.equal(with_blank[:2], alone) and not with_blank[2:].any()


def test_a_tolerance_is_relative_to_the_largest_reward():
    rewards = torch.tensor([100.0, 100.5, 0.1, 0.1005, 0.1, 0.2, 0.95, 0.95])
    assert informative_groups(rewards, 2).tolist() == [True, True, True, False]
    assert informative_groups(rewards, 2, tolerance=0.01).tolist() == [False, False, True, False]
