"""Dynamic sampling in real runs."""

import math

import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

from grpo_trl import GRPOTrainer
from grpo_trl.batch import Group, Prompt, RolloutBatch
from grpo_trl.rollouts.dynamic import Scored
from tests.test_trainer import assert_same, dataset, logged, reward_vowels, trainer, weights

EQUAL = {"question 0", "question 3"}  # prompts whose completions all get the same reward


def some_equal(prompts, completions, **kwargs):
    values = reward_vowels(completions)
    return [1.0 if prompt in EQUAL else value for prompt, value in zip(prompts, values, strict=True)]


def all_equal(completions, **kwargs):
    return [0.0] * len(completions)


class Watching(GRPOTrainer):
    """Keeps every batch, and the draws of every rollout."""

    def get_train_dataloader(self):
        self.batches, self.draws = getattr(self, "batches", []), getattr(self, "draws", [])
        return super().get_train_dataloader()

    def rollout(self, prompts):
        self.draws.append([prompt.draw for prompt in prompts])
        return super().rollout(prompts)

    def collect_informative(self, take):
        self.batches.append(super().collect_informative(take))
        return self.batches[-1]


def dynamic(path, rewards=some_equal, **options):
    options = {"dynamic_sampling": True, "num_iterations": 1, "shuffle_dataset": False, "beta": 0.0} | options
    return trainer(path, rewards=rewards, data=dataset(8), cls=Watching, **options)


def zero_groups(batch, size=4):
    return int((batch.advantages.view(-1, size) == 0).all(1).sum())


def test_every_group_of_an_update_has_a_gradient(tmp_path):
    run = dynamic(tmp_path, max_steps=6)
    run.train()
    assert len(run.batches) == 6 and not any(map(zero_groups, run.batches))
    drawn = [draw for draws in run.draws for draw in draws]
    assert drawn == list(range(len(drawn)))  # prompts in their order, none left out
    assert sum(logged(run, "dynamic_sampling/drawn")) == len(drawn)
    kept, right = (sum(logged(run, f"dynamic_sampling/{name}")) for name in ("kept", "all_right"))
    assert kept == 12 and right >= sum(draw % 8 in (0, 3) for draw in drawn) > 0
    costs = logged(run, "dynamic_sampling/tokens_per_trained_token")
    assert min(costs) > 0 and costs[0] > 1  # the first prompt is dropped
    assert logged(run, "dynamic_sampling/skipped_updates") == [0.0] * 6
    without = trainer(
        tmp_path, rewards=some_equal, data=dataset(8), num_iterations=1, shuffle_dataset=False, max_steps=6
    )
    without.train()
    assert max(logged(without, "frac_reward_zero_std")) == 0.5


def test_a_group_without_a_token_in_the_loss_is_not_informative(tmp_path):
    run = dynamic(tmp_path, max_completion_length=8, mask_truncated_completions=True, max_steps=1)
    run.train()
    assert 0.5 < logged(run, "completions/clipped_ratio")[0] < 1
    drawn, equal = logged(run, "dynamic_sampling/drawn")[0], logged(run, "frac_reward_zero_std")[0]
    assert logged(run, "dynamic_sampling/kept")[0] < drawn * (1 - equal)
    (batch,) = run.batches
    learned = (batch.loss_mask.any(1) & (batch.advantages != 0)).view(-1, 4).any(1)
    assert learned.sum() == logged(run, "dynamic_sampling/kept")[0] > 0


@pytest.mark.parametrize(
    ("rewards", "terminated", "informative"),
    [
        ([1.0, 0.0, 0.0, 0.0], [True] * 4, True),
        ([1.0, 0.0, 0.0, 0.0], [False, True, False, False], True),
        ([1.0, 0.0, 0.0, 0.0], [False] * 4, False),
        ([1.0, 0.0, 0.5, 0.5], [False, False, True, True], False),  # those that count are average
        ([1.0, 1.0, 1.0, 1.0], [True] * 4, False),
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_what_is_informative(tmp_path, rewards, terminated, informative, masked):
    run = dynamic(tmp_path, mask_truncated_completions=masked)
    run.get_train_dataloader()
    group = Group(Prompt([1], {}, 0), [[5, 6]] * 4, terminated)
    expected = informative if masked else len(set(rewards)) > 1
    assert run.dynamic_sampler.is_informative(Scored(group, rewards, 0)) is expected
    tool = Group(Prompt([1], {}, 0), [[5, 6]] * 4, [True] * 4, loss_masks=[[0, 0]] * 4)  # all of it masked
    assert not run.dynamic_sampler.is_informative(Scored(tool, [1.0, 0.0, 0.0, 0.0], 0))


def test_surplus_is_trained_with_the_ratio_of_the_policy_that_sampled_it(tmp_path):
    run = dynamic(tmp_path, max_steps=6, max_concurrent_rows=16)  # rounds of four prompts, batches of two
    run.train()
    carried = logged(run, "dynamic_sampling/carried")
    assert carried[0] == 0 and max(carried) > 0
    batch = next(b for b, n in zip(run.batches, carried, strict=True) if n)
    assert batch.old_per_token_logps is not None
    mask = batch.completion_mask.bool()
    gap = (batch.old_per_token_logps - batch.sampling_per_token_logps)[mask].abs()
    assert gap.max() < 1e-4  # of each row by the policy that sampled it
    ratios = logged(run, "importance_ratio/token")
    assert max(abs(ratio - 1) for ratio in ratios) > 1e-3  # the policy has moved since


def test_a_second_run_begins_without_the_surplus_of_the_first(tmp_path):
    run = dynamic(tmp_path, max_steps=2, max_concurrent_rows=16)
    run.train()
    assert run.dynamic_sampler.surplus
    run.get_train_dataloader()  # which a run begins with; its draws and steps are counted from 0 again
    assert not run.dynamic_sampler.surplus


def test_no_surplus_is_kept_at_age_zero(tmp_path):
    run = dynamic(tmp_path, max_steps=4, max_concurrent_rows=16, dynamic_sampling_max_age=0)
    run.train()
    assert logged(run, "dynamic_sampling/carried") == [0] * 4
    assert all(batch.old_per_token_logps is None for batch in run.batches)  # on-policy


@pytest.mark.parametrize("truncated", [{"top_k": 5}, {"top_p": 0.7, "temperature": 0.7}], ids=["top_k", "top_p"])
def test_no_surplus_is_kept_of_a_truncated_distribution(tmp_path, truncated):
    """Its log-probabilities are not the policy's, so that the ratio would not be 1 where nothing has moved."""
    run = dynamic(tmp_path, max_steps=4, max_concurrent_rows=16, **truncated)
    run.train()
    assert logged(run, "dynamic_sampling/carried") == [0] * 4
    assert logged(run, "importance_ratio/token") == pytest.approx([1.0] * 4)


def one_of_four(prompts, completions, **kwargs):
    values = reward_vowels(completions)
    return [value if prompt == "question 1question 1" else 0.0 for prompt, value in zip(prompts, values, strict=True)]


def test_a_batch_that_is_not_full_has_the_gradient_of_its_groups(tmp_path, caplog):
    """At the bound the groups found are trained on, with their own counts."""
    options = {"max_steps": 1, "per_device_train_batch_size": 16, "dynamic_sampling_max_rounds": 1}
    run = dynamic(tmp_path, one_of_four, **options)
    before = weights(run)
    run.train()
    (batch,) = run.batches
    assert zero_groups(batch) == 3 and batch.loss_mask.view(4, -1).any(1).sum() == 1
    assert any("1 informative groups of 4" in record.message for record in caplog.records)
    alone = trainer(
        tmp_path, rewards=one_of_four, data=dataset(8).select([0, 1, 2, 3]), num_iterations=1, shuffle_dataset=False,
        beta=0.0, max_steps=1, per_device_train_batch_size=16, mask_truncated_completions=False,
    )  # fmt: skip
    alone.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(run).items())
    # without dynamic sampling the same group is diluted by three without gradient
    assert logged(run, "grad_norm")[0] > 1.5 * logged(alone, "grad_norm")[0]


def test_places_that_stay_empty_do_not_count_against_the_sampler(tmp_path):
    options = {"dynamic_sampling": True, "shuffle_dataset": False, "beta": 0.0, "dynamic_sampling_max_rounds": 1}
    run = trainer(
        tmp_path, rewards=one_of_four, data=dataset(8), max_steps=2, num_iterations=2, per_device_train_batch_size=16,
        **options,
    )  # fmt: skip
    run.train()
    assert logged(run, "dynamic_sampling/kept")[0] == 1 and run._sampling_is_exact


def test_groups_that_straddle_optimizer_steps_fill_the_batch(tmp_path):
    run = dynamic(
        tmp_path, one_of_four, max_steps=2, per_device_train_batch_size=2, steps_per_generation=6,
        gradient_accumulation_steps=3, dynamic_sampling_max_rounds=1,
    )  # fmt: skip
    run.train()
    assert [len(batch) for batch in run.batches] == [12]  # three groups in two steps


@pytest.fixture
def scoring(tmp_path, monkeypatch):
    """A trainer whose policy gives each token -2."""
    run = dynamic(tmp_path)
    monkeypatch.setattr(run, "_policy_logps", lambda batch: torch.full(batch.completion_ids.shape, -2.0))
    return run


def batch_of(*sampled, loss_masks=None):
    """Groups of two completions that were sampled with the same log-probabilities."""
    groups = [
        Group(Prompt([5], {}, draw), [[7, 8], [9, 9]], [True, True], [list(row)] * 2, loss_masks=loss_masks)
        for draw, row in enumerate(sampled)
    ]
    return RolloutBatch.from_groups(groups, pad_token_id=0)


def test_tokens_of_carried_rows_that_were_not_sampled_get_the_policys(scoring):
    scoring._sampling_is_exact = False
    batch = batch_of((-1.0, math.nan), (-1.0, -1.0), loss_masks=[[1, 0], [1, 0]])
    old = scoring._old_per_token_logps(batch, torch.tensor([True, True, False, False]))
    assert old.tolist() == [[-1.0, -2.0]] * 2 + [[-2.0, -2.0]] * 2


@pytest.mark.parametrize(
    ("carried", "sampled", "exact"),
    [
        (False, (-2.0, -9.0), True),  # the last token is in no loss
        (False, (-9.0, -2.0), False),
        (True, (-2.0, -2.0), None),  # a former policy sampled all
    ],
)
def test_the_sampler_is_compared_on_tokens_of_the_loss_that_this_policy_sampled(scoring, carried, sampled, exact):
    scoring._sampling_is_exact = None
    batch = batch_of(sampled, loss_masks=[[1, 0], [1, 0]])
    scoring._old_per_token_logps(batch, torch.tensor([carried] * 2))
    assert scoring._sampling_is_exact is exact


def test_an_update_without_a_group_moves_nothing(tmp_path):
    """Not the weights, and not the optimizer's moments; the schedule goes on."""
    rewards = {"now": some_equal}

    def switched(prompts, completions, **kwargs):
        return rewards["now"](prompts=prompts, completions=completions)

    run = dynamic(tmp_path, switched, max_steps=2, dynamic_sampling_max_rounds=2, lr_scheduler_type="linear")
    kept = {}

    class Between(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            moments = {id(p): {k: v.clone() for k, v in s.items()} for p, s in run.optimizer.state.items() if s}
            kept[state.global_step] = (weights(run), moments, run.lr_scheduler.get_last_lr())
            rewards["now"] = all_equal

    run.add_callback(Between())
    run.train()
    first, second = kept[1], kept[2]
    assert_same(first[0], second[0])
    assert first[1].keys() == second[1].keys() and first[1]
    for parameter, moments in first[1].items():
        assert all(torch.equal(value, second[1][parameter][name]) for name, value in moments.items())
    assert second[2] < first[2]
    assert logged(run, "dynamic_sampling/skipped_updates") == [0.0, 1.0]
    assert all(loss == loss for loss in logged(run, "loss"))


@pytest.mark.parametrize("cut", [2, 3])
def test_a_run_cut_in_two_is_the_run(tmp_path, cut):
    """With carried groups in the checkpoint, and inside a rollout buffer."""
    options = {"max_steps": 6, "max_concurrent_rows": 16, "steps_per_generation": 2, "shuffle_dataset": True}
    straight = dynamic(tmp_path / "straight", **options)
    straight.train()
    assert max(logged(straight, "dynamic_sampling/carried")) > 0
    dynamic(tmp_path / "cut", save_strategy="steps", save_steps=cut, **options).train()
    resumed = dynamic(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    assert_same(weights(straight), weights(resumed))
    for key in ("dynamic_sampling/drawn", "dynamic_sampling/carried", "reward", "grad_norm"):
        assert logged(straight, key) == logged(resumed, key)


def keep_short_prompts(group, rewards):
    return len(group.prompt.ids) < 20 and len(set(rewards)) > 1


def test_a_filter_by_dotted_path(tmp_path):
    run = dynamic(tmp_path, max_steps=3, dynamic_sampling_filter="tests.test_trainer_dynamic.keep_short_prompts")
    run.train()
    assert max(int(batch.prompt_mask.sum(1).max()) for batch in run.batches) < 20
    with pytest.raises(ValueError, match=r"dynamic_sampling_filter='tests\.no\.such' leads to nothing"):
        dynamic(tmp_path, dynamic_sampling_filter="tests.no.such")


def test_dapo(tmp_path):
    """The row as a whole: clip-higher, no reference, dynamic sampling, both ways with long completions."""
    run = trainer(tmp_path, rewards=some_equal, data=dataset(8), cls=Watching, variant="dapo", num_iterations=2)
    args = run.args
    assert (args.epsilon, args.epsilon_high, args.beta, args.token_weighting) == (0.2, 0.28, 0.0, "token")
    assert args.dynamic_sampling and args.mask_truncated_completions and run.reference is None
    assert run.reward_names == ["some_equal", "soft_overlong"]
    run.train()
    assert all(torch.isfinite(weight).all() for weight in weights(run).values())
    # most completions are truncated, so that right ones sum to less than 1: they are right all the same
    assert min(logged(run, "rewards/soft_overlong/mean")) < 0 < sum(logged(run, "dynamic_sampling/all_right"))


def test_fp16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient scaler of fp16 does not allow; use bf16"):
        dynamic(tmp_path, fp16=True)


def test_a_column_that_some_rounds_leave_out_is_none_there(tmp_path):
    """What the table of completions holds of all that was sampled."""
    calls = []

    def reward(prompts, completions, log_extra, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            log_extra("second", completions)
        return some_equal(prompts, completions)

    run = dynamic(tmp_path, rewards=reward, log_completions=True, max_steps=1)
    run.train()
    (file,) = (tmp_path / "completions").glob("*.parquet")
    table = pd.read_parquet(file)
    assert len(calls) >= 2 and len(table) == sum(calls)
    found, texts = table["second"].tolist(), table["completion"].tolist()
    second = slice(calls[0], calls[0] + calls[1])
    assert found[second] == texts[second]
    assert not any(map(pd.notna, found[: calls[0]] + found[sum(calls[:2]) :]))
    assert table["advantage"].notna().sum() == 8  # those of the batch: what was dropped or kept back has none
