"""Ranks exit without an abort right after collectives."""

import subprocess
import sys

import pytest

# A rank that exits while gloo's threads still hold tensors of 50 collectives; `torch.group` keeps the group alive.
RANK = """
import sys, torch, torch.distributed as dist
from grpo_trl.ranks_exit import pause_at_exit

store = f"file://{sys.argv[1]}"
dist.init_process_group("gloo", init_method=store, rank=int(sys.argv[2]), world_size=2)
torch.group = dist.group.WORLD
pause_at_exit()


def gather(count):
    both = [torch.zeros(2) for _ in range(count)]
    for work in [dist.all_gather_into_tensor(pair, torch.ones(1), async_op=True) for pair in both]:
        work.wait()
    return {value for pair in both for value in pair.tolist()}


assert gather(50) == {1.0}
dist.destroy_process_group()
"""


@pytest.mark.parametrize("attempt", range(3))
def test_a_rank_exits_right_after_collectives(tmp_path, attempt):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
