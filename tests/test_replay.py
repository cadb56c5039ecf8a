"""A run replayed from its rollouts ends with the same weights and logs: nothing is sampled, scored or referred to."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from pyarrow import parquet

from grpo_trl import GRPOTrainer
from grpo_trl.callbacks import read_parquet
from grpo_trl.rollouts import dump
from tests.test_trainer import assert_same, config, dataset, trainer, weights

DOCS = Path(__file__).resolve().parent.parent / "docs" / "diagnosis.md"
TIMES = ("runtime", "per_second", "_seconds", "step_time")


def reward(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / 7 + len(text) / 3 for text in completions]


def rarely(completions, **kwargs):
    return [None if len(text) % 2 else float(text.count("e")) for text in completions]


class Replayed(GRPOTrainer):
    """Fails where a run would sample or score."""

    def rollout(self, prompts):
        raise AssertionError("a replay samples nothing")

    def score(self, groups, metrics):
        raise AssertionError("a replay scores nothing")


def logs(run, *without):
    keep = [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in run.state.log_history]
    return [{k: v for k, v in row.items() if not k.startswith(without)} for row in keep] if without else keep


def recorded(path, **options):
    run = trainer(path, rewards=[reward, rarely], log_rollouts=True, **options)
    run.train()
    return run


def replayed(path, source, **options):
    run = trainer(path, rewards=[reward, rarely], cls=Replayed, replay_rollouts=str(source / "rollouts"), **options)
    run.train()
    return run


TWICE = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 8}


def test_a_rollout_of_another_number_of_ranks(tmp_path):
    recorded(tmp_path / "a", max_steps=1)
    (path,) = (tmp_path / "a" / "rollouts").iterdir()
    path.with_name(dump.file_name(0, 1)).write_bytes(path.read_bytes())  # left by a former run: no matter
    replayed(tmp_path / "b", tmp_path / "a", max_steps=1)
    table = parquet.read_table(path)
    parquet.write_table(table.replace_schema_metadata({dump.RANKS: "2"}), path)
    with pytest.raises(ValueError, match="collection 0 was written by 2 ranks, and this run has 1; replay it with as"):
        replayed(tmp_path / "b", tmp_path / "a", max_steps=1)


class Halved(GRPOTrainer):
    def rollout(self, prompts):
        for group in super().rollout(prompts):
            group.completions = ["half \ud83d"] * len(group)
            yield group


def test_half_a_character_does_not_end_a_run(tmp_path):
    run = trainer(tmp_path, cls=Halved, rewards=reward, log_rollouts=True, max_steps=1)
    run.train()
    (path,) = (tmp_path / "rollouts").iterdir()
    assert set(read_parquet(path)["completion"]) == {r"half \ud83d"}


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 1, "beta": 0.0},
        {"max_steps": 6},
        TWICE,
        {**TWICE, "per_device_train_batch_size": 2, "variant": "dr_grpo", "beta": 0.1, "weight_decay": 0.1},
        {
            "num_iterations": 2,
            "mask_truncated_completions": True,
            "max_completion_length": 60,
            "sampler_correction": "token_truncate",
        },
        {
            "num_iterations": 2,
            "peft": LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"]),
            "disable_dropout": False,
        },
    ],
    ids=["on-policy", "default", "accumulated", "straddling", "masked", "dropout"],
)  # fmt: skip
def test_the_same_weights_and_logs(tmp_path, options):
    first = recorded(tmp_path / "a", **options)
    second = replayed(tmp_path / "b", tmp_path / "a", **options)
    start = weights(trainer(tmp_path / "c", **{k: v for k, v in options.items() if k == "peft"}))
    assert any(not torch.equal(start[name], weight) for name, weight in weights(first).items())
    assert_same(weights(first), weights(second))
    assert logs(first) == logs(second)
    assert "rewards/rarely/mean" in logs(second)[0]


def sometimes_equal(completions, **kwargs):
    """Equal rewards in about half of the groups of four."""
    return [len(completions[i - i % 4]) % 2 * reward([text])[0] for i, text in enumerate(completions)]


def test_dynamic_sampling_with_carried_groups(tmp_path):
    options = {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 3, "num_iterations": 2, "max_steps": 8,
               "per_device_train_batch_size": 16, "data": dataset(8)}  # fmt: skip
    first = trainer(tmp_path / "a", rewards=sometimes_equal, log_rollouts=True, **options)
    first.train()
    replay = str(tmp_path / "a" / "rollouts")
    second = trainer(tmp_path / "b", rewards=sometimes_equal, cls=Replayed, replay_rollouts=replay, **options)
    second.train()
    assert sum(row.get("dynamic_sampling/carried", 0) for row in logs(first)) > 0
    assert_same(weights(first), weights(second))
    # metrics of rollouts are those of the batch here, and of all that was sampled there
    of_updates = ("loss", "policy_loss", "kl", "grad_norm", "entropy", "importance_ratio/token", "sampling/logp_gap")
    for key in of_updates:
        assert [row.get(key) for row in logs(first)] == [row.get(key) for row in logs(second)], key


def test_a_rank_without_a_group_takes_part_in_what_all_do(tmp_path, monkeypatch):
    """Where dynamic sampling found too few, all places of a rank may be empty."""
    recorded(tmp_path / "a", max_steps=1)
    read = dump.read_rollout

    def without_groups(*args, **kwargs):
        rollout = read(*args, **kwargs)
        for group in rollout.groups:
            group.prompt.draw = -1
        return rollout

    monkeypatch.setattr(dump, "read_rollout", without_groups)
    counts = []
    for source in (Replayed, GRPOTrainer):
        options = {"replay_rollouts": str(tmp_path / "a" / "rollouts")} if source is Replayed else {}
        run = trainer(tmp_path / "b", rewards=[reward, rarely], cls=source, max_steps=1, **options)
        monkeypatch.setattr(run.accelerator, "gather", lambda x, seen=counts: seen.append(x.item()) or x)
        next(iter(run.get_train_dataloader()))
    assert len(counts) == 2 and counts[0] == 0 < counts[1]


def test_a_resumed_run_can_be_replayed_from_its_checkpoint(tmp_path):
    options = {"max_steps": 8, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3}
    first = recorded(tmp_path / "a", **options)
    second = trainer(tmp_path / "b", rewards=[reward, rarely], cls=Replayed,
                     replay_rollouts=str(tmp_path / "a" / "rollouts"), **options)  # fmt: skip
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_same(weights(first), weights(second))


def test_one_file_per_collection_with_text_and_rewards(tmp_path):
    run = recorded(tmp_path, max_steps=4, num_iterations=2)
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == ["rollout_000000_rank_0.parquet", "rollout_000001_rank_0.parquet"]
    tables = [pd.read_parquet(file) for file in files]
    assert [sorted(set(table["step"])) for table in tables] == [[0], [2]]
    table = tables[0]
    assert len(table) == 8 and sorted(set(table["draw"])) == [0, 1]
    decoded = [run.processing_class.decode(list(ids), skip_special_tokens=True) for ids in table["completion_ids"]]
    assert decoded == list(table["completion"])
    assert table["rewards/reward"].tolist() == pytest.approx(reward(decoded))
    assert table["rewards/rarely"].isna().tolist() == [text is None for text in rarely(decoded)]
    assert table["advantage"].abs().max() > 0
    for column in ("sampling_logps", "old_logps", "ref_logps", "loss_mask"):
        assert [len(row) for row in table[column]] == [len(ids) for ids in table["completion_ids"]]


def test_another_objective_on_the_same_rollouts(tmp_path):
    first = recorded(tmp_path / "a", num_iterations=2)
    second = replayed(tmp_path / "b", tmp_path / "a", num_iterations=2, epsilon=0.01, learning_rate=1e-3)
    assert logs(first)[0]["rewards/reward/mean"] == logs(second)[0]["rewards/reward/mean"]
    assert any(not torch.equal(weights(first)[name], weight) for name, weight in weights(second).items())


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": "none"},
        {"advantage_baseline": "leave_one_out"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"reward_weights": [0.2, 1.0]},
        {"variant": "dr_grpo", "beta": 0.01},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_advantages_on_the_same_rollouts(tmp_path, options):
    """The replay of a first rollout is what a run with these options makes of it, which samples the same."""
    one = {"num_iterations": 1, "max_steps": 1}
    recorded(tmp_path / "a", **one)
    fresh = trainer(tmp_path / "b", rewards=[reward, rarely], **one, **options)
    fresh.train()
    again = replayed(tmp_path / "c", tmp_path / "a", **one, **options)
    assert_same(weights(again), weights(fresh))
    assert logs(again, "rollout/")[0]["reward"] == logs(fresh)[0]["reward"]


def test_a_replay_of_other_rewards_temperature_or_groups_is_refused(tmp_path):
    one = {"num_iterations": 1, "max_steps": 1}
    recorded(tmp_path / "a", **one)
    for options, message in (
        ({"temperature": 0.5}, r"at temperature=1.0; set that, not 0.5"),
        (
            {"overlong_penalty": True},
            "holds rewards of reward, rarely, and this run has reward, rarely, soft_overlong",
        ),
        ({"num_generations": 2}, "does not hold groups of num_generations=2"),
    ):
        with pytest.raises(ValueError, match=message):
            replayed(tmp_path / "b", tmp_path / "a", **one, **options)


def test_a_replay_shows_completions_and_leaves_the_prompt_memory(tmp_path):
    one = {"num_iterations": 1, "max_steps": 1, "log_completions": True}
    recorded(tmp_path, **one)
    table = (tmp_path / "completions" / "completions_00001.parquet").read_bytes()
    memory = (tmp_path / "prompt_memory.parquet").read_bytes()
    (tmp_path / "completions" / "completions_00001.parquet").unlink()
    replayed(tmp_path, tmp_path, **one)
    assert (tmp_path / "completions" / "completions_00001.parquet").read_bytes() == table
    assert (tmp_path / "prompt_memory.parquet").read_bytes() == memory


def test_what_a_replay_lacks_is_said(tmp_path):
    recorded(tmp_path / "a", num_iterations=1, beta=0.0, max_steps=2)
    with pytest.raises(FileNotFoundError, match=r"000002_rank_0.parquet does not exist: .* collections 0 to 1"):
        replayed(tmp_path / "b", tmp_path / "a", num_iterations=1, beta=0.0, max_steps=3)
    with pytest.raises(ValueError, match=r"no log-probabilities of a reference, which beta=0.1 needs") as error:
        replayed(tmp_path / "b", tmp_path / "a", num_iterations=2, beta=0.1, max_steps=2)
    assert "no old log-probabilities" in str(error.value)
    with pytest.raises(ValueError, match="holds 8 completions, but per_device_train_batch_size=4"):
        replayed(tmp_path / "b", tmp_path / "a", num_iterations=1, beta=0.0, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="replay_rollouts='nowhere' is no folder") as error:
        config(tmp_path, replay_rollouts="nowhere", log_rollouts=True)
    assert "leave log_rollouts out" in str(error.value)


def test_a_collect_of_ones_own_without_groups_is_told_what_to_set(tmp_path):
    class Own(GRPOTrainer):
        def collect(self, prompts):
            batch = super().collect(prompts)
            self.collected = []
            return batch

    with pytest.raises(ValueError, match=r"set `self\.collected` there"):
        trainer(tmp_path, cls=Own, log_rollouts=True).train()


def test_groups_that_a_collect_of_ones_own_did_not_score_have_unknown_rewards(tmp_path):
    class Own(GRPOTrainer):
        def collect(self, prompts):
            batch = super().collect(prompts)
            self.collected[0].rewards_per_func = None
            return batch

    trainer(tmp_path, cls=Own, log_rollouts=True, max_steps=1).train()
    (path,) = (tmp_path / "rollouts").iterdir()
    assert pd.read_parquet(path)["rewards/reward_vowels"].isna().tolist() == [True] * 4 + [False] * 4


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    recorded(tmp_path / "run", max_steps=2, num_iterations=1)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    found: dict = {}
    exec(compile(code, str(DOCS), "exec"), found)
    assert len(found["worst"]) == 3
