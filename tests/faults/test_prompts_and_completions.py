"""Empty completions and prompts, prompts longer than the model, and batches that teach nothing."""

import math

import pytest
import torch

from grpo_trl import Group, GRPOTrainer
from tests.test_trainer import assert_same, dataset, logged, trainer, weights
from tests.tiny import IM_END, tiny_model


def numbers_are_finite(run) -> bool:
    values = [value for entry in run.state.log_history for value in entry.values() if isinstance(value, float)]
    return len(values) > 10 and all(map(math.isfinite, values))


def by_row(completions, **kwargs):
    return [float(row % 4) for row in range(len(completions))]


@pytest.mark.parametrize("empty", ["some", "all"])
@pytest.mark.parametrize("ids", [[], [IM_END]], ids=["no-token", "end-at-once"])
def test_empty_completions_are_scored_as_empty_text_and_train(tmp_path, empty, ids):
    seen = []

    class Silent(GRPOTrainer):
        def rollout(self, prompts):
            for prompt in prompts:
                rows = [list(ids) if empty == "all" or row % 2 else [40, 41, IM_END] for row in range(4)]
                yield Group(prompt, rows, [bool(row) for row in rows])

    def rewards(completions, **kwargs):
        seen.extend(completions)
        return by_row(completions)

    run = trainer(tmp_path, cls=Silent, rewards=rewards, max_steps=2)
    run.train()
    assert seen[1] == "" and (empty == "all") == (set(seen) == {""})
    assert numbers_are_finite(run)
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())


@pytest.mark.parametrize("bad", ["", "  ", []])
def test_an_empty_prompt_is_refused_with_its_row(tmp_path, bad):
    rows = [{"prompt": "fine"}, {"prompt": bad}]
    with pytest.raises(ValueError, match=r"train_dataset, row 2, column 'prompt': (empty text|an empty list)"):
        trainer(tmp_path, data=rows)


def test_an_empty_prompt_of_a_stream_is_refused_when_it_comes(tmp_path):
    data = dataset(4).map(lambda row, index: {"prompt": "" if index == 3 else row["prompt"]}, with_indices=True)
    run = trainer(tmp_path, data=data.to_iterable_dataset(), shuffle_dataset=False, num_iterations=1)
    with pytest.raises(ValueError, match=r"Cannot encode the prompt '': empty text"):
        run.train()


def test_a_prompt_longer_than_a_table_of_positions_is_refused_with_both_lengths(tmp_path):
    model = tiny_model("gpt2", max_position_embeddings=64)
    rows = [{"prompt": "short"}, {"prompt": "x" * 60}]
    with pytest.raises(ValueError, match=r"prompt of 60 tokens and max_completion_length=8 need more than the 64"):
        trainer(tmp_path, model=model, data=rows).train()
    run = trainer(tmp_path, model=model, data=rows, max_prompt_length=40, overlong_prompts="truncate", max_steps=1)
    run.train()
    assert numbers_are_finite(run)


def test_a_prompt_longer_than_the_positions_of_a_rotary_model_trains(tmp_path):
    model = tiny_model("qwen3", max_position_embeddings=16)
    run = trainer(tmp_path, model=model, data=[{"prompt": "x" * 40}, {"prompt": "y"}], max_steps=2)
    run.train()
    assert numbers_are_finite(run)


@pytest.mark.parametrize("scale", ["group", "batch", "batch_relative", "none"])
def test_a_batch_of_dead_groups_moves_nothing(tmp_path, scale):
    def equal(completions, **kwargs):
        return [0.95] * len(completions)

    run = trainer(tmp_path, rewards=equal, scale_rewards=scale, beta=0.0, max_steps=2)
    before = weights(run)
    run.train()
    assert logged(run, "frac_reward_zero_std")[0] == 1.0 and logged(run, "grad_norm") == [0.0, 0.0]
    assert_same(before, weights(run))
    assert numbers_are_finite(run)
