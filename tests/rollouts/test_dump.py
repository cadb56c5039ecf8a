"""Rollouts on disk: what is read is what was written, bit for bit."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.rollouts.dump import Rollout, file_name, read_rollout, write_rollout
from grpo_trl.rollouts.dynamic import blank

MESSAGES = [{"role": "user", "content": 'zwei "plus" zwei?'}]


def rollout(with_logps=True) -> Rollout:
    """Two groups and an empty place; numbers whose fp32 has no short decimal form."""
    generator = torch.Generator().manual_seed(0)
    numbers = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    groups = [
        Group(Prompt([5, 6], {"prompt": "text"}, 7), [[1, 2, 3], [4]], [True, False], completions=["a", "b\n|"],
              sampling_per_token_logps=[numbers(3).tolist(), numbers(1).tolist()], loss_masks=[[1, 0, 1], [1]],
              rewards_per_func=torch.tensor([[0.1, torch.nan], [1 / 3, 1e-30]])),
        Group(Prompt([9], {"prompt": MESSAGES}, 3_000_000_000), [[8, 8], []], [True, False],
              completions=[[{"role": "assistant", "content": "vier"}], ""],
              sampling_per_token_logps=[numbers(2).tolist(), []]),
        blank(2, 0),
    ]  # fmt: skip
    batch = RolloutBatch.from_groups(groups, pad_token_id=0, mask_truncated_completions=True)
    batch.advantages = numbers(6)
    if with_logps:
        batch.old_per_token_logps = numbers(6, 3) * batch.completion_mask
        batch.ref_per_token_logps = torch.tensor(-1e-39) * batch.completion_mask  # a subnormal number
    else:
        batch.sampling_per_token_logps = None
    return Rollout(groups, batch, torch.tensor([0.1, 1 / 3, torch.nan, 2.0, torch.nan, torch.nan]), ["x", "a/b"])


def read(path, **options):
    return read_rollout(
        path, **{"num_generations": 2, "pad_token_id": 0, "mask_truncated_completions": True} | options
    )


@pytest.mark.parametrize("with_logps", [True, False])
def test_every_tensor_comes_back(tmp_path, with_logps):
    written = rollout(with_logps)
    path = tmp_path / "deep" / file_name(12, 3)
    write_rollout(path, written, step=5)
    assert path.name == "rollout_000012_rank_3.parquet"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    found = read(path)
    assert found.batch.tensors().keys() == written.batch.tensors().keys()
    for name, tensor in written.batch.tensors().items():
        assert found.batch[name].dtype == tensor.dtype and torch.equal(found.batch[name], tensor), name
    assert torch.equal(found.rewards.nan_to_num(-7), written.rewards.nan_to_num(-7))
    assert found.reward_names == ["x", "a/b"]
    first, second, free = found.groups
    assert torch.equal(first.rewards_per_func.nan_to_num(-7), written.groups[0].rewards_per_func.nan_to_num(-7))
    assert second.rewards_per_func.isnan().all()
    assert (first.prompt.ids, first.prompt.draw, free.prompt.draw) == ([5, 6], 7, -1)
    assert first.terminated == [True, False] and first.loss_masks == [[1, 0, 1], [1]]


def test_the_file_is_read_by_others(tmp_path):
    write_rollout(tmp_path / "x.parquet", rollout(), step=5)
    rows = list(Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path)))
    assert rows[1]["completion"] == "b\n|" and rows[0]["rewards/a/b"] is None and rows[0]["step"] == 5
    assert json.loads(rows[2]["prompt"]) == MESSAGES and json.loads(rows[2]["completion"])[0]["content"] == "vier"
    schema = pq.read_schema(tmp_path / "x.parquet")
    assert str(schema.field("old_logps").type) == "list<element: float>"


def test_truncated_completions_are_masked_as_the_reader_says(tmp_path):
    write_rollout(tmp_path / "x.parquet", rollout(), step=0)
    masked, whole = (read(tmp_path / "x.parquet", mask_truncated_completions=on) for on in (True, False))
    assert masked.batch.loss_mask[1].sum() == 0 and whole.batch.loss_mask[1].sum() == 1
    assert whole.batch.loss_mask[0].tolist() == [1, 0, 1]


def test_what_is_wrong_is_said(tmp_path):
    write_rollout(tmp_path / file_name(0, 0), rollout(), step=0)
    write_rollout(tmp_path / file_name(4, 1), rollout(), step=0)
    with pytest.raises(FileNotFoundError, match=r"holds collections 0 to 4 of 2 ranks\. Set max_steps"):
        read(tmp_path / file_name(5, 0))
    with pytest.raises(FileNotFoundError, match="holds no rollouts"):
        read(tmp_path / "elsewhere" / file_name(0, 0))
    for size in (3, 4):
        with pytest.raises(ValueError, match=f"does not hold groups of num_generations={size}"):
            read(tmp_path / file_name(0, 0), num_generations=size)
    Dataset.from_dict({"prompt": ["a"], "draw": [0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="is no rollout that log_rollouts wrote: it lacks advantage, completion_ids"):
        read(tmp_path / "other.parquet")
