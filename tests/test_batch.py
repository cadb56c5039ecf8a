import pytest
import torch

from grpo_trl.batch import Group, Prompt, RolloutBatch

EOS = 2


def group(prompt_ids, completion_ids, terminated=None, **fields):
    terminated = [True] * len(completion_ids) if terminated is None else terminated
    return Group(Prompt(prompt_ids, {"prompt": "?"}, draw=0), completion_ids, terminated, **fields)


def two_groups(**fields):
    return [
        group([5], [[6, 7, EOS], [8, EOS]], **fields),
        group([9, 10, 11], [[EOS], [12, 13, 14, 15]], terminated=[True, False], **fields),
    ]


def test_prompts_are_padded_left_and_completions_right():
    batch = RolloutBatch.from_groups(two_groups(), pad_token_id=0)
    assert batch.prompt_ids.tolist() == [[0, 0, 5], [0, 0, 5], [9, 10, 11], [9, 10, 11]]
    assert batch.prompt_mask.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]]
    assert batch.completion_ids.tolist() == [[6, 7, EOS, 0], [8, EOS, 0, 0], [EOS, 0, 0, 0], [12, 13, 14, 15]]
    assert batch.completion_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.loss_mask.tolist() == batch.completion_mask.tolist()
    assert batch.group_ids.tolist() == [0, 0, 1, 1]  # although the two prompts have the same draw number here
    assert len(batch) == 4
    assert all(tensor.dtype == torch.long for tensor in batch.tensors().values())


def test_pad_token_that_is_eos_loses_no_eos():
    batch = RolloutBatch.from_groups(two_groups(), pad_token_id=EOS)
    in_loss = (batch.completion_ids == EOS) & batch.loss_mask.bool()
    assert in_loss.sum(1).tolist() == [1, 1, 1, 0]  # the last one is truncated
    # the mask ends at the EOS, which is in it
    last = batch.completion_ids.gather(1, batch.loss_mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert last.tolist() == [EOS, EOS, EOS, 15]


def test_pad_token_inside_the_text_counts():
    batch = RolloutBatch.from_groups([group([0, 5], [[0, 0, EOS], [0]])], pad_token_id=0)
    assert batch.prompt_mask.tolist() == [[1, 1], [1, 1]]
    assert batch.completion_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_truncated_completions_can_be_masked():
    batch = RolloutBatch.from_groups(two_groups(), pad_token_id=0, mask_truncated_completions=True)
    assert batch.loss_mask.sum(1).tolist() == [3, 2, 1, 0]
    assert batch.completion_mask.sum(1).tolist() == [3, 2, 1, 4]  # they stay in the attention


def test_tool_output_is_kept_out_of_the_loss():
    masked = group([5], [[6, 7, 8, EOS], [6, EOS]], loss_masks=[[1, 0, 0, 1], [1, 1]])
    unmasked = group([5], [[6, 7], [EOS]], terminated=[False, True])
    batch = RolloutBatch.from_groups([masked, unmasked], pad_token_id=0)
    assert batch.loss_mask.tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_truncation_wins_over_a_loss_mask():
    tools = group([5], [[6, 7, 8]], terminated=[False], loss_masks=[[1, 0, 1]])
    batch = RolloutBatch.from_groups([tools], pad_token_id=0, mask_truncated_completions=True)
    assert batch.loss_mask.tolist() == [[0, 0, 0]]


def test_sampling_log_probabilities():
    logps = [[[-0.1, -0.2, -0.3], [-0.4, -0.5]], [[-0.6], [-0.7, -0.8, -0.9, -1.0]]]
    groups = two_groups()
    for one, values in zip(groups, logps, strict=True):
        one.sampling_per_token_logps = values
    batch = RolloutBatch.from_groups(groups, pad_token_id=0)
    expected = [[-0.1, -0.2, -0.3, 0], [-0.4, -0.5, 0, 0], [-0.6, 0, 0, 0], [-0.7, -0.8, -0.9, -1.0]]
    assert batch.sampling_per_token_logps is not None
    assert batch.sampling_per_token_logps.dtype == torch.float32
    torch.testing.assert_close(batch.sampling_per_token_logps, torch.tensor(expected))


def test_sampling_log_probabilities_of_some_groups_only_are_left_out():
    groups = two_groups()
    groups[0].sampling_per_token_logps = [[-0.1] * 3, [-0.1] * 2]
    assert RolloutBatch.from_groups(groups, pad_token_id=0).sampling_per_token_logps is None


def test_one_token_and_empty_completions():
    batch = RolloutBatch.from_groups([group([5, 6], [[EOS], []], [True, False])], pad_token_id=0)
    assert batch.completion_ids.tolist() == [[EOS], [0]]
    assert batch.completion_mask.tolist() == [[1], [0]]


def test_only_empty_completions_keep_one_column():
    batch = RolloutBatch.from_groups([group([5], [[], []], [False, False])], pad_token_id=0)
    assert batch.completion_ids.shape == (2, 1)
    assert batch.loss_mask.sum() == 0


def test_groups_may_have_different_sizes():
    batch = RolloutBatch.from_groups([group([5], [[6]] * 3), group([7], [[8]])], pad_token_id=0)
    assert batch.prompt_ids.flatten().tolist() == [5, 5, 5, 7]


def full_batch():
    """Every field set; advantages, ids and log-probabilities of row i say i."""
    batch = RolloutBatch.from_groups(two_groups(), pad_token_id=0)
    row = torch.arange(4.0)
    for name in ("token_weights", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        setattr(batch, name, row[:, None].expand(4, 4).clone())
    batch.advantages = row
    return batch


def test_rows_are_trimmed_to_their_own_longest():
    batch = full_batch().rows(slice(0, 2))
    assert batch.prompt_ids.tolist() == [[5], [5]]
    assert batch.completion_ids.tolist() == [[6, 7, EOS], [8, EOS, 0]]
    for name, tensor in batch.tensors().items():
        own = {"advantages": (2,), "group_ids": (2,), "prompt_ids": (2, 1), "prompt_mask": (2, 1)}
        width = own.get(name, (2, 3))
        assert tensor.shape == width, name
    assert batch.tensors().keys() == full_batch().tensors().keys()


def test_rows_stay_paired_when_shuffled():
    whole = full_batch()
    order = [2, 0, 3, 1]
    shuffled = whole.rows(order)
    assert shuffled.advantages is not None and shuffled.old_per_token_logps is not None
    assert shuffled.advantages.tolist() == [2, 0, 3, 1]
    assert shuffled.old_per_token_logps[:, 0].tolist() == [2, 0, 3, 1]
    assert shuffled.completion_ids.tolist() == whole.completion_ids[order].tolist()
    assert shuffled.prompt_ids.tolist() == whole.prompt_ids[order].tolist()


def test_rows_keep_absent_fields_absent():
    batch = RolloutBatch.from_groups(two_groups(), pad_token_id=0).rows(slice(2, 3))
    assert batch.advantages is None and batch.ref_per_token_logps is None
    assert batch.completion_ids.tolist() == [[EOS]]


def test_rows_of_an_empty_completion():
    batch = RolloutBatch.from_groups([group([5], [[], [6, 7]], [False, False])], pad_token_id=0).rows(slice(0, 1))
    assert batch.completion_ids.shape == (1, 1)
    assert batch.completion_mask.tolist() == [[0]]


def test_per_token_advantages_are_trimmed_too():
    batch = full_batch()
    batch.advantages = torch.ones(4, 4)
    assert batch.rows(slice(0, 2))["advantages"].shape == (2, 3)


def test_reads_like_a_mapping():
    batch = full_batch()
    batch.ref_per_token_logps = None
    assert batch["advantages"] is batch.advantages
    assert "advantages" in batch
    assert "ref_per_token_logps" not in batch
    assert "rows" not in batch and "unknown" not in batch
    assert "ref_per_token_logps" not in batch.tensors()


def test_fields_can_be_set_like_those_of_a_mapping():
    batch = RolloutBatch.from_groups(two_groups(), pad_token_id=0)
    batch["advantages"] = torch.ones(len(batch))
    assert torch.equal(batch.advantages, torch.ones(len(batch)))
    with pytest.raises(KeyError, match="no field 'advantage'"):
        batch["advantage"] = torch.ones(len(batch))


def test_to_keeps_dtypes():
    batch = full_batch().to("meta")
    assert {tensor.device.type for tensor in batch.tensors().values()} == {"meta"}
    assert batch["completion_ids"].dtype == torch.long
    assert batch["advantages"].dtype == torch.float32


@pytest.mark.parametrize("num_completions", [1, 4])
def test_length_of_a_group_is_its_completions(num_completions):
    assert len(group([5], [[6]] * num_completions)) == num_completions
