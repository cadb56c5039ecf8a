"""What a run of `GRPOTrainer` says, counts and leaves behind, and what reaches the rewards."""

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import TrainerCallback

from tests.test_trainer import PROMPTS, adapter, dataset, logged, reward_vowels, trainer


def test_rewards_get_the_prompt_alone_without_unused_columns(tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        seen.append(columns)
        return [float(len(text)) for text in completions]

    data = dataset(answer=list("abcd"), trainer_state=list("abcd"))  # a name that rewards get would be refused
    trainer(tmp_path, rewards=reward, data=data, max_steps=1, remove_unused_columns=True, eval_dataset=data,
            eval_on_start=True).train()  # fmt: skip
    assert seen == [{}] * 3
    trainer(tmp_path, rewards=reward, data=dataset(answer=list("abcd")), max_steps=1).train()
    assert set(seen[-1]) == {"answer"}


def test_the_resolved_objective_is_logged_and_saved(tmp_path, caplog):
    run = trainer(tmp_path, variant="deepseekmath", save_strategy="steps", save_steps=2)
    for text in ("variant deepseekmath", "arXiv 2402.03300", "kl_estimator k3,"):
        assert caplog.text.count(text) == 1
    run.train()
    for folder in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"):
        card = (folder / "README.md").read_text()
        assert "objective `deepseekmath`" in card and "| kl_estimator | k3 |" in card
    assert not (tmp_path / "epoch_1").exists()


def test_the_card_of_an_adapter_is_ours(tmp_path):
    """PEFT writes a card without content beside each adapter."""
    run = trainer(tmp_path, peft=adapter(0), save_strategy="steps", save_steps=2, save_epochs=True, plot_metrics=True)
    run.train()
    run.save_model()
    for folder, plot in ((".", ""), ("checkpoint-2", "../"), ("epoch_1", "../")):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert {"grpo_trl", "grpo"} <= set(card.data.tags) and card.data.library_name == "peft"
        assert "| token_weighting | token |" in card.text and f"]({plot}training_metrics.png)" in card.text


def test_completions_of_an_evaluation_are_shown_and_saved(tmp_path, capsys):
    sets = {"easy": dataset(2, answer=["x", "y"]), "hard": dataset(3, answer=["x", "y", "z"])}
    run = trainer(
        tmp_path, eval_dataset=sets, log_completions=True, eval_strategy="steps", eval_steps=2, max_steps=2,
        num_generations_eval=3, num_completions_to_print=1,
    )  # fmt: skip
    run.train()
    folder = tmp_path / "completions"
    assert sorted(path.stem for path in folder.iterdir()) == [
        "completions_00001", "completions_00002_eval_easy", "completions_00002_eval_hard",
    ]  # fmt: skip
    table = Dataset.from_parquet(str(folder / "completions_00002_eval_hard.parquet"))
    assert table["prompt"] == [prompt for prompt in PROMPTS[:3] for _ in range(3)]
    assert table["reward_vowels"] == pytest.approx(reward_vowels(table["completion"]))
    assert table["advantage"] == [None] * 9 and table["step"] == [2] * 9
    shown = capsys.readouterr().out
    assert [shown.count(f"Step {title} ") for title in ("1", "2 eval_easy", "2 eval_hard")] == [1, 1, 1]


def test_what_is_left_at_the_end_is_logged_with_the_training_loss(tmp_path):
    options = {"num_iterations": 1, "log_completions": True, "max_steps": 5, "num_completions_to_print": 0}
    every = trainer(tmp_path / "a", logging_steps=1, **options)
    every.train()
    run = trainer(tmp_path / "b", logging_steps=3, **options)
    run.train()
    third, last = run.state.log_history
    assert third["step"] == 3 and "train_loss" not in third
    assert last["step"] == 5 and "train_loss" in last and last["num_tokens"] == logged(every, "num_tokens")[-1]
    assert last["reward"] == pytest.approx(sum(logged(every, "reward")[3:5]) / 2)
    assert {"entropy", "policy_loss", "completions/mean_length"} <= last.keys()
    files = sorted(path.stem for path in (tmp_path / "b" / "completions").iterdir())
    assert files == ["completions_00003", "completions_00005"]
    assert "reward" not in every.state.log_history[-1]  # nothing twice


# ---- What transformers counts ----


def test_tokens_and_operations_are_counted(tmp_path):
    run = trainer(tmp_path, include_num_input_tokens_seen="all", max_steps=3, num_iterations=2, logging_steps=1)
    seen = []

    def training_step(model, inputs, *args, **kwargs):
        seen.append(inputs["prompt_ids"].numel() + inputs["completion_ids"].numel())
        return type(run).training_step(run, model, inputs, *args, **kwargs)

    run.training_step = training_step
    run.train()
    assert run.state.total_flos == 6 * sum(seen) * run.model.num_parameters(exclude_embeddings=True) > 0
    # real tokens of two rollouts of 8 completions: 8 tokens each, and the prompts
    lengths = logged(run, "completions/mean_length")
    assert logged(run, "num_input_tokens_seen")[:3] == logged(run, "num_tokens")[:3]
    prompts = [4 * sum(len(prompt.ids) for prompt in run.loader.prompts(collection)) for collection in (0, 1)]
    assert run.state.num_input_tokens_seen == sum(prompts) + round(8 * (lengths[0] + lengths[1]))


def test_gradients_are_dropped_after_each_step(tmp_path):
    freed = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            freed.append(all(parameter.grad is None for parameter in model.parameters()))

    run = trainer(tmp_path, max_steps=2)
    run.add_callback(Watch())
    run.train()
    assert freed == [True, True]
