"""Prompt memory and the skipping of prompts in real runs."""

import pyarrow.parquet
import pytest

from grpo_trl import GRPOTrainer
from grpo_trl.callbacks import read_parquet
from tests.test_trainer import assert_same, dataset, logged, reward_vowels, trainer, weights

SOLVED, HOPELESS = {"question 0", "question 3"}, {"question 6"}  # their completions all get the same reward


def by_prompt(prompts, completions, **kwargs):
    """Some prompts are solved, one is hopeless, of the others the first completion of a group passes."""
    spread = [value / 100 for value in reward_vowels(completions)]
    return [
        1.0 if prompt in SOLVED else 0.0 if prompt in HOPELESS else 1.0 + value if row % 4 == 0 else value
        for row, (prompt, value) in enumerate(zip(prompts, spread, strict=True))
    ]


class Watching(GRPOTrainer):
    """Keeps the prompts and the draw numbers of every rollout."""

    def get_train_dataloader(self):
        self.seen, self.draws = [], []
        return super().get_train_dataloader()

    def rollout(self, prompts):
        self.seen += [prompt.example["prompt"] for prompt in prompts]
        self.draws += [prompt.draw for prompt in prompts]
        return super().rollout(prompts)


def run(path, **options):
    options = {"num_iterations": 1, "beta": 0.0, "max_steps": 12} | options
    return trainer(path, rewards=by_prompt, data=dataset(8), cls=Watching, **options)


def test_the_memory_of_a_run_is_exported(tmp_path):
    made = run(tmp_path, max_steps=6, shuffle_dataset=False)  # two prompts a step, eight in all
    made.train()
    table = read_parquet(tmp_path / "prompt_memory.parquet")
    assert list(table) == [
        "prompt", "draws", "completions", "passed", "solved_streak", "hopeless_streak", "last_step", "pass_rate",
        "key",
    ]  # fmt: skip
    assert table["prompt"] == dataset(8)["prompt"]
    assert table["draws"] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert table["completions"] == [8, 8, 8, 8, 4, 4, 4, 4]
    assert table["pass_rate"] == [1.0, 0.25, 0.25, 1.0, 0.25, 0.25, 0.0, 0.25]
    assert table["solved_streak"] == [2, 0, 0, 2, 0, 0, 0, 0] and table["hopeless_streak"] == [0] * 6 + [1, 0]
    assert table["last_step"] == [4, 4, 5, 5, 2, 2, 3, 3]
    assert str(pyarrow.parquet.read_schema(tmp_path / "prompt_memory.parquet").field("prompt").type) == "string"
    assert not logged(made, "prompt_memory/skipped_ratio")  # nothing can be skipped


def test_what_passes_is_said_by_the_threshold(tmp_path):
    made = run(tmp_path, max_steps=1, shuffle_dataset=False, eval_pass_threshold=1.001)
    made.train()
    assert made.prompt_memory.table()["pass_rate"] == [0.0, 0.25]  # 1 and a little more than 1


def test_solved_and_hopeless_prompts_are_no_longer_drawn(tmp_path):
    made = run(tmp_path, skip_solved_after=1, skip_hopeless_after=2, shuffle_dataset=False)
    made.train()
    assert len(made.seen) == 24
    assert {prompt: made.seen.count(prompt) for prompt in SOLVED | HOPELESS} == {
        "question 0": 1, "question 3": 1, "question 6": 2,
    }  # fmt: skip
    assert made.draws == sorted(set(made.draws)) and made.draws[-1] > 24
    ratios = logged(made, "prompt_memory/skipped_ratio")
    assert ratios[:4] == [0.0] * 4 and max(ratios) == pytest.approx(0.5)  # two passed over, two drawn
    # past the first lap, no rollout is spent on what teaches nothing
    assert max(logged(made, "frac_reward_zero_std")[8:]) == 0


def test_dynamic_sampling_counts_dropped_groups_and_skips(tmp_path):
    plain, made = (
        run(tmp_path / name, dynamic_sampling=True, shuffle_dataset=False, **options)
        for name, options in (("plain", {}), ("skips", {"skip_solved_after": 1, "skip_hopeless_after": 1}))
    )
    plain.train()
    made.train()
    assert sum(logged(plain, "dynamic_sampling/all_right")) > sum(logged(made, "dynamic_sampling/all_right")) == 2
    assert sum(logged(made, "dynamic_sampling/all_wrong")) == 1
    for trained in (plain, made):
        table = trained.prompt_memory.table()
        assert sum(table["draws"]) == len(trained.seen) == sum(logged(trained, "dynamic_sampling/drawn"))
        rates = dict(zip(table["prompt"], table["pass_rate"], strict=True))
        assert rates["question 0"] == rates["question 3"] == 1 and rates["question 6"] == 0


@pytest.mark.parametrize(
    "options",
    [{"steps_per_generation": 2}, {"dynamic_sampling": True, "max_concurrent_rows": 16}],
    ids=["plain", "dynamic"],
)
@pytest.mark.parametrize("cut", [7, 10])
def test_a_run_cut_in_two_is_the_run(tmp_path, options, cut):
    """After prompts were skipped: the memory goes on where it was, and so do draws, weights and logs."""
    options = options | {"skip_solved_after": 1, "skip_hopeless_after": 1}
    straight = run(tmp_path / "straight", **options)
    straight.train()
    assert max(logged(straight, "prompt_memory/skipped_ratio")) > 0
    first = run(tmp_path / "cut", save_strategy="steps", save_steps=cut, **options)
    first.train()
    saved = read_parquet(tmp_path / "cut" / f"checkpoint-{cut}" / "prompt_memory.parquet")
    assert 0 < sum(saved["draws"]) < sum(straight.prompt_memory.table()["draws"])
    resumed = run(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}"))
    assert_same(weights(straight), weights(resumed))
    assert resumed.draws and straight.draws[-len(resumed.draws) :] == resumed.draws
    assert straight.prompt_memory.table() == resumed.prompt_memory.table()
    for key in ("prompt_memory/skipped_ratio", "reward", "grad_norm"):
        assert logged(straight, key) == logged(resumed, key)


def test_a_run_that_pushes_does_not_publish_its_prompts(tmp_path):
    made = run(tmp_path, max_steps=1)
    made.train()
    made.args.push_to_hub = True
    (tmp_path / "prompt_memory.parquet").unlink()
    made.callback_handler.on_train_end(made.args, made.state, made.control)
    assert [path.name for path in tmp_path.glob("*prompt_memory*")] == ["_prompt_memory.parquet"]
