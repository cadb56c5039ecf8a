import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from grpo_trl.algorithm import VARIANTS
from grpo_trl.config import GOVERNED, GRPOConfig
from grpo_trl.model_card import ARXIV_ID, CITATIONS, create_model_card
from tests.tiny import tiny_encoder_decoder


class PlainTrainer(Trainer):
    """transformers' Trainer with the attributes of GRPOTrainer that the card reads."""

    _tag_names = ["grpo_trl", "grpo"]
    recipe: dict | None = None
    reward_weights = torch.tensor([1.0, 0.2])
    reward_names = ["accuracy", "think_format"]


def card_of(folder, model, *, recipe=None, name=None, card_options=None, **options) -> ModelCard:
    args = GRPOConfig(output_dir=str(folder), use_cpu=True, **options)
    trainer = PlainTrainer(model=model, args=args)
    trainer.recipe = recipe
    trainer.state.global_step = 120
    trainer.state.log_history = [{"step": 1, "reward": 0.25}, {"step": 2}, {"step": 120, "reward": 0.75}]
    create_model_card(trainer, name, **(card_options or {}))
    return ModelCard.load((card_options or {}).get("folder", folder) / "README.md")


def test_card_says_what_was_trained_and_how(tmp_path, qwen3):
    qwen3.config._name_or_path = "Qwen/Qwen3-0.6B"
    recipe = {
        "train_datasets": [
            {"path": "openai/gsm8k", "type": "hub", "input": "question", "output": "answer", "name": "main"},
            {"path": "/home/me/private/more.jsonl", "type": "jsonl", "input": "question"},
        ]
    }
    card = card_of(
        tmp_path / "my-run",
        qwen3,
        recipe=recipe,
        variant="deepseekmath",
        hub_model_id="me/my-model",
        card_options={"tags": "math"},
    )
    data = card.data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-0.6B"
    assert data["datasets"] == ["openai/gsm8k"]
    assert data["tags"] == ["grpo_trl", "grpo", "deepseekmath", "reinforcement-learning", "math"]
    assert data["library_name"] == "transformers"
    assert data["model_name"] == "my-model"
    for text in (
        "# my-model",
        "objective `deepseekmath`\n(arXiv 2402.03300)",
        'pipeline("text-generation", model="me/my-model")',
        "- [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k) (hub, input `question`, output `answer`",
        "- `more.jsonl` (jsonl, input `question`)",
        "| accuracy | 1 |\n| think_format | 0.2 |",
        "| scale_rewards | group |",
        "| beta | 0.04 |",
        "| optimizer steps | 120 |",
        "| completions per prompt (G) | 4 |",
        "| passes over each rollout (mu) | 4 |",
        "| learning rate | 1e-06 |",
        "| reward, first and last log | 0.250, 0.750 |",
        "- transformers: ",
        "@article{shao2024deepseekmath,",
    ):
        assert text in card.text, text
    assert "private" not in card.content
    assert "None" not in card.content


def test_card_lists_every_resolved_field_of_the_objective(tmp_path, qwen3):
    card = card_of(tmp_path, qwen3, delta=4.0)
    assert all(f"| {name} | " in card.text for name in ("variant", "paper", *GOVERNED))


def test_card_without_anything_of_the_hub(tmp_path, model_dir):
    (tmp_path / "training_metrics.png").write_bytes(b"")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    card = card_of(tmp_path, model, name="tiny")
    assert "base_model" not in card.data.to_dict()
    assert "datasets" not in card.data.to_dict()
    assert "A local model trained with GRPO" in card.text
    assert model_dir not in card.content  # a path of the machine that trained
    assert "## Data\n\nGiven in code.\n" in card.text
    assert "![Training metrics](training_metrics.png)" in card.text
    assert "pipeline(" not in card.text


def test_dataset_ids_given_by_the_caller(tmp_path, qwen3):
    card = card_of(tmp_path, qwen3, card_options={"dataset_name": "openai/gsm8k"})
    assert card.data.datasets == ["openai/gsm8k"]
    assert "- [openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)" in card.text


def test_a_data_set_by_name_is_that_of_the_recipe(tmp_path, qwen3):
    card = card_of(tmp_path, qwen3, recipe={"dataset_name": "openai/gsm8k"})
    assert card.data.datasets == ["openai/gsm8k"]
    (tmp_path / "private").mkdir()
    card = card_of(tmp_path, qwen3, recipe={"dataset_name": str(tmp_path / "private")})
    assert "datasets" not in card.data.to_dict() and "private" not in card.content
    assert "## Data\n\nLocal files.\n" in card.text


def test_card_in_a_folder_of_its_own(tmp_path, qwen3):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training_metrics.png").write_bytes(b"")
    for folder, link in (("out", ""), ("out/checkpoint-1", "../"), (".", None), ("elsewhere", None)):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = card_of(tmp_path / "out", qwen3, card_options={"folder": tmp_path / folder}).text
        assert ("training_metrics.png" in text) is (link is not None)
        assert link is None or f"]({link}training_metrics.png)" in text


def test_an_encoder_decoder_is_loaded_as_one(tmp_path):
    card = card_of(tmp_path, tiny_encoder_decoder("t5"), hub_model_id="me/x")
    assert 'AutoModelForSeq2SeqLM.from_pretrained("me/x")' in card.text and "pipeline_tag" not in card.data.to_dict()


def test_adapter_is_a_peft_model(tmp_path, qwen3):
    qwen3.config._name_or_path = "Qwen/Qwen3-0.6B"
    model = get_peft_model(qwen3, LoraConfig(target_modules=["q_proj"]))
    card = card_of(tmp_path, model, hub_model_id="me/adapter")
    assert card.data.library_name == "peft"
    assert "loads the base model and this adapter" in card.text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/adapter")' in card.text and "pipeline(" not in card.text


def test_only_the_main_process_writes(tmp_path, qwen3, monkeypatch):
    monkeypatch.setattr(PlainTrainer, "is_world_process_zero", lambda self: False)
    trainer = PlainTrainer(model=qwen3, args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True))
    create_model_card(trainer)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_tagged_and_cited(tmp_path, qwen3, name):
    card = card_of(tmp_path, qwen3, variant=name)
    assert card.data.tags == list(dict.fromkeys(["grpo_trl", "grpo", name, "reinforcement-learning"]))
    papers = ARXIV_ID.findall(VARIANTS[name].paper)
    assert papers
    for paper in papers:
        assert CITATIONS.get(paper, f"https://arxiv.org/abs/{paper}") in card.text
