"""What `GRPOTrainer` refuses before it loads a model."""

import inspect
import re
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from grpo_trl import GRPOTrainer
from grpo_trl.refused import UNCALLED
from grpo_trl.rewards import AccuracyReward, exact_match
from tests.test_trainer import adapter, config, dataset, logged, reward_vowels, trainer
from tests.tiny import save, tiny_model, tiny_reward_model, tiny_tokenizer


def test_all_that_is_wrong_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError) as error:
        GRPOTrainer(
            "no/such-model", ["acuracy"], config(tmp_path, rollout_engine="warp"), Dataset.from_dict({"text": ["a"]}),
            rollout_func=print,
        )  # fmt: skip
    message = str(error.value)
    for part in ("rollout_func", "rollout_engine='warp'", "'acuracy' is unknown", "no 'prompt' column"):
        assert part in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Dataset.from_dict({"prompt": ["a"], "trainer_state": ["b"]})}, "columns trainer_state"),
        (
            {"data": Dataset.from_dict({"prompt": ["a"], "image": ["b"]})},
            "column image, which the policy would",
        ),
        ({"eval_dataset": Dataset.from_dict({"prompt": []})}, "eval_dataset has no rows"),
        ({"prompt_format": "text", "system_prompt": "be brief"}, "system_prompt needs a chat template"),
        ({"rewards": ["/no/such/judge"]}, "no/such/judge"),
        ({"ref_model_name_or_path": "/no/such/model"}, "no/such/model"),
        ({"rewards": lambda completions, **_: [0.0], "reward_timeout": 1.0}, "define it at module level"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 values for 1 reward functions"),
        ({"ref_device": "cuda:77"}, "ref_device: device 'cuda:77' does not exist"),
        ({"reward_device": "gpu"}, "reward_device: device 'gpu' is unknown; use auto, same"),
        ({"ref_device": {"": 77}}, "ref_device: device 77 does not exist"),
        ({"eval_strategy": "epoch"}, "eval_strategy or eval_on_start asks for evaluation, .*pass one"),
        ({"eval_on_start": True}, "there is no eval_dataset; pass one"),
        (
            {
                "rewards": ["accuracy", reward_vowels, exact_match],
                "data": Dataset.from_dict({"prompt": ["a"], "label": ["b"]}),
            },
            "accuracy and exact_match: train_dataset has neither .*; its columns are prompt, label. Rename",
        ),
        (
            {
                "rewards": "reasoning_accuracy_reward",
                "remove_unused_columns": True,
                "data": Dataset.from_dict({"prompt": ["a"], "answer": ["b"]}),
            },
            r"reasoning_accuracy_reward: train_dataset has neither .*prompt \(remove_unused_columns=True\)",
        ),
        ({"eval_dataset": {"": dataset()}, "eval_on_start": True}, "the name of a set is empty"),
        ({"report_to": ["wandbb"]}, "wandbb is not supported, only .*wandb"),
        ({"report_to": ["azure_ml"]}, r"report_to=\['azure_ml'\]: .*pip install azureml-sdk"),
        ({"push_to_hub": True}, "push_to_hub=True needs a token: .*HF_TOKEN"),
        (
            {"eval_dataset": {"math": dataset()}, "metric_for_best_model": "eval_rewards/reward_vowels/mean"},
            "with several eval sets each has its own; set eval_math_rewards/reward_vowels/mean",
        ),
        ({"model": tiny_reward_model()}, "which cannot generate text; pass a causal LM"),
        ({"eval_on_start": True, "eval_dataset": {}}, "there is no eval_dataset; pass one"),
        ({"data": dataset().to_iterable_dataset(), "max_steps": -1}, "train_dataset is a stream.*set max_steps"),
        (
            {"rollout_engine": "transformers_cb", "repetition_penalty": 1.2},
            "'transformers_cb' has no repetition_penalty, .*use native or hf_generate",
        ),
        ({"model": "./no/such/model"}, r"model './no/such/model': no such folder \(current directory: /"),
        (
            {"data": Dataset.from_dict({"prompt": ["a", "b"], "chat_template_kwargs": [None, "{}"]})},
            r"train_dataset: row 2, column 'chat_template_kwargs': the str '{}', expected a mapping",
        ),
        (
            {
                "data": [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": "b"}],
                "prompt_format": "text",
                "system_prompt": "be brief",
            },
            "train_dataset: system_prompt needs a chat template, but prompt_format='text'",
        ),  # the first text is the second row
    ],
)
def test_refused_before_the_model_is_loaded(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr("grpo_trl.assembly.load_policy", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr("grpo_trl.trainer_checks.get_token", lambda: None)  # whoever runs this may have one
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_a_conversation_further_down_meets_the_template_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_trl.assembly.load_policy", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": [{"role": "user", "content": "c"}]}]
    with pytest.raises(ValueError, match="train_dataset: The prompt is a conversation, but the tokenizer"):
        GRPOTrainer(tiny_model("qwen3"), reward_vowels, config(tmp_path), rows,
                    processing_class=tiny_tokenizer(chat=False))  # fmt: skip


@pytest.mark.parametrize("cls", [trl.GRPOConfig, TrainingArguments])
def test_arguments_of_another_class_are_named_with_the_import(tmp_path, cls):
    args = cls(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(
        TypeError, match=rf"args is a {cls.__module__}.{cls.__name__}, .*from grpo_trl import GRPOConfig"
    ):
        GRPOTrainer(tiny_model("qwen3"), reward_vowels, args, dataset(), processing_class=tiny_tokenizer())


@pytest.mark.parametrize("name", sorted(UNCALLED))
def test_a_method_that_nothing_calls_may_not_be_overridden(tmp_path, name):
    mine = type("Mine", (GRPOTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(ValueError, match=rf"Mine\.{name} would never be called; override {re.escape(UNCALLED[name])}"):
        trainer(tmp_path, cls=mine)


def test_every_method_of_trls_trainer_is_called_or_said_not_to_be():
    theirs = {name for name, value in vars(trl.GRPOTrainer).items() if inspect.isfunction(value)}
    assert "_generate_and_score_completions" in theirs
    assert {name for name in theirs if name not in UNCALLED and not hasattr(GRPOTrainer, name)} == set()


def test_methods_of_trl_that_are_put_into_the_class_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, *args: None, raising=False)
    with pytest.raises(ValueError, match=r"GRPOTrainer._calculate_rewards would never be called"):
        trainer(tmp_path)


def test_a_model_may_be_a_path_object(tmp_path):
    path = Path(save(tiny_model(), tiny_tokenizer(), tmp_path / "model"))
    assert trainer(tmp_path / "run", path).model.config.name_or_path == str(path)


def test_a_change_of_the_arguments_does_not_part_training_from_sampling(tmp_path):
    """Both are at the temperature that the trainer was made with."""
    run = trainer(tmp_path, max_steps=1, num_iterations=2)
    run.args.temperature = 0.5
    run.train()
    assert logged(run, "sampling/logp_gap")[0] < 1e-4


def test_what_is_overridden_or_read_of_transformers_trainer_is_still_there():
    """Private names of its Trainer, which a release may change."""
    overridden = {
        *("_evaluate", "_finalize_training", "_get_grad_norm", "_get_output_dir", "_issue_warnings_after_load"),
        *(
            "_load_best_model",
            "_load_from_checkpoint",
            "_load_optimizer_and_scheduler",
            "_load_rng_state",
            "_maybe_log_save_evaluate",
            "_push_from_checkpoint",
            "_run_epoch",
            "_save",
        ),
        *("_save_checkpoint", "_save_optimizer_and_scheduler", "_set_signature_columns_if_needed"),
        "_track_num_input_tokens",
    }
    assert {name for name in overridden if not callable(getattr(Trainer, name, None))} == set()
    source = inspect.getsource(Trainer)
    kept = {"_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step"}
    assert {name for name in kept if f"self.{name}" not in source} == set()
    ours = {name for part in GRPOTrainer.__mro__ if part.__module__.startswith("grpo_trl") for name in vars(part)}
    private = {name for name in ours if name.startswith("_") and not name.startswith("__")}
    assert private & set(vars(Trainer)) <= overridden | {"_get_num_items_in_batch", "_prepare_inputs", "_tag_names"}


@pytest.mark.parametrize("name", ["model", "ref_model_name_or_path"])
def test_a_reward_model_is_no_policy(tmp_path, name):
    path = save(tiny_reward_model(), tiny_tokenizer(), tmp_path / "judge")
    with pytest.raises(ValueError, match=f"{name} '{path}' is a .*ForSequenceClassification, which cannot generate"):
        trainer(tmp_path / "run", **{name: path})


def test_a_model_without_its_tokenizer_is_named(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"The tokenizer of .*model' has special tokens only: its files"):
        GRPOTrainer(str(tmp_path / "model"), reward_vowels, config(tmp_path / "run"), dataset())


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    for path in (tmp_path / "out", tmp_path / "out" / "run"):
        with pytest.raises(ValueError, match=f"output_dir='{path}': {tmp_path / 'out'} is a file; name a folder"):
            trainer(path)


def test_weights_are_not_saved_beside_an_adapter(tmp_path):
    first = trainer(tmp_path / "out", max_steps=1, peft=adapter(0))
    first.save_model()
    with pytest.raises(ValueError, match=r"output_dir=.* holds an adapter, which would be loaded instead"):
        trainer(tmp_path / "out")
    assert trainer(tmp_path / "out", peft=adapter(1)) and trainer(tmp_path / "other")


class OfAnotherColumn(AccuracyReward):
    def __call__(self, /, completions, gold=None, **kwargs):
        return super().__call__(completions, answer=gold)


def test_gold_answers_may_be_elsewhere(tmp_path):
    gold = Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})
    watched = {"rewards": ["accuracy", reward_vowels], "reward_weights": [0.0, 1.0]}
    run = trainer(tmp_path, **watched, eval_dataset=gold, eval_on_start=True, max_steps=1)
    run.train()
    assert logged(run, "eval_rewards/accuracy/mean") == [0.0]
    data = Dataset.from_dict({"prompt": ["a"], "gold": ["b"]})
    trainer(tmp_path, rewards=OfAnotherColumn(), data=data)


def test_gold_answers_may_come_from_a_transform(tmp_path):
    def add(batch):
        return batch | {"answer": ["b"] * len(batch["prompt"])}

    data = Dataset.from_dict({"prompt": ["a", "b"]}).with_transform(add)
    run = trainer(tmp_path, rewards="exact_match", data=data, max_steps=1)
    run.train()
    assert logged(run, "rewards/exact_match/mean") == [0.0]  # not None


def test_a_token_that_the_model_does_not_embed_is_named(tmp_path):
    run = trainer(tmp_path, model=tiny_model("qwen3", vocab_size=70))
    with pytest.raises(ValueError, match=r"The prompt '.*' has the token \d+, and the model embeds 70 tokens only"):
        run.train()
