"""Two real processes joined by gloo compute what one does."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grpo_trl.algorithm import group_advantages, token_weights
from grpo_trl.algorithm.advantages import SCALE_REWARDS
from grpo_trl.algorithm.token_weights import TOKEN_WEIGHTINGS

from .test_token_weights import make_rows, step_gradient

# Three prompts on the first rank, one on the second; a missing reward and a group of equal ones among them.
REWARDS = ([0.1, 0.9, 0.4, 0.4, 5.0, float("nan"), 7.0, 7.5, 0.7, 0.7, 0.7, 0.7], [-3.0, 1.0, 2.0, 2.5])
ROWS = (slice(0, 3), slice(3, 8))  # of `make_rows`: ranks with different numbers of completions and of tokens


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks computed: {"advantages": by scale, "gradients": by weighting}."""
    folder = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        rewards = torch.tensor(REWARDS[rank])
        advantages = {name: group_advantages(rewards, 4, name, all_reduce=sum_over_ranks) for name in SCALE_REWARDS}
        gradients = {name: averaged_gradient(rank, name) for name in TOKEN_WEIGHTINGS}
        torch.save({"advantages": advantages, "gradients": gradients}, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def sum_over_ranks(value):
    dist.all_reduce(value)
    return value


def averaged_gradient(rank, token_weighting):
    """This rank's rows as micro-batches of two, then the mean over ranks, which is what data parallelism takes."""
    rows = {name: value[ROWS[rank]] for name, value in make_rows().items()}
    weights = token_weights(
        rows["loss_mask"], token_weighting, max_completion_length=16, world_size=2, all_reduce=sum_over_ranks
    )
    return sum_over_ranks(step_gradient(rows, weights, 2)) / 2


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
def test_advantages(ranks, scale_rewards):
    one = group_advantages(torch.tensor([*REWARDS[0], *REWARDS[1]]), 4, scale_rewards)
    two = torch.cat([rank["advantages"][scale_rewards] for rank in ranks])
    torch.testing.assert_close(two, one, atol=1e-7, rtol=0)


@pytest.mark.parametrize("scale_rewards", ["batch", "batch_relative"])
def test_advantages_without_the_reduction_would_differ(ranks, scale_rewards):
    alone = group_advantages(torch.tensor(REWARDS[1]), 4, scale_rewards)
    assert (ranks[1]["advantages"][scale_rewards] - alone).abs().max() > 0.1


@pytest.mark.parametrize("token_weighting", TOKEN_WEIGHTINGS)
def test_gradient(ranks, token_weighting):
    rows = make_rows()
    weights = token_weights(rows["loss_mask"], token_weighting, max_completion_length=16)
    one = step_gradient(rows, weights, 8)
    assert one.abs().max() > 0.01
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"][token_weighting], one, atol=1e-6, rtol=0)
