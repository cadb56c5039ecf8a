"""Reward models with a PEFT adapter: an instance, and a folder that holds the adapter only."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from grpo_trl.rewards import RewardModel
from grpo_trl.rewards.loading import is_reward_model
from tests import tiny
from tests.test_trainer import logged, trainer

PROMPTS, COMPLETIONS = ["How many?", "Why is the sky blue?"], ["72", "Because of scattering."]


def train_adapter(tmp_path, base, **options):
    """A classifier over the saved `base` with a LoRA adapter and a head of its own; saved to `adapter`."""
    path = tiny.save(base, tiny.tiny_tokenizer(), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=options.pop("num_labels", 1))
    torch.manual_seed(1)
    config = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"], "init_lora_weights": False} | options
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    return model, str(tmp_path / "adapter")


@pytest.mark.parametrize("base", [tiny.tiny_model, tiny.tiny_reward_model], ids=["causal LM", "classifier"])
def test_instance_and_folder_score_alike(tmp_path, base):
    model, path = train_adapter(tmp_path, base("qwen3"))
    reward = RewardModel(model, tiny.tiny_tokenizer())
    ids = reward._encode(PROMPTS[0], COMPLETIONS[0])["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits.item()
        with model.disable_adapter():
            assert model(input_ids=torch.tensor([ids])).logits.item() != pytest.approx(expected, abs=0.01)
    assert reward(PROMPTS, COMPLETIONS)[0] == pytest.approx(expected, abs=1e-5)
    loaded = RewardModel(path, device_map="cpu", dtype="float32")
    assert loaded(PROMPTS, COMPLETIONS) == pytest.approx(reward(PROMPTS, COMPLETIONS), abs=1e-5)
    assert loaded.__name__ == "adapter" and not any(p.requires_grad for p in loaded.model.parameters())


def test_both_train_a_policy(tmp_path):
    model, path = train_adapter(tmp_path, tiny.tiny_model("qwen3"))
    run = trainer(tmp_path / "run", rewards=[model, path], max_steps=1)
    run.train()
    assert run.reward_names == ["base", "adapter"]  # an instance is called as the model that it was loaded from
    assert logged(run, "rewards/base/mean") == pytest.approx(logged(run, "rewards/adapter/mean"), abs=1e-5)


def test_what_is_a_reward_model(tmp_path):
    model, path = train_adapter(tmp_path, tiny.tiny_reward_model("qwen3"))
    assert is_reward_model(model) and is_reward_model(path) and is_reward_model(model.base_model.model)
    assert not is_reward_model(torch.nn.Linear(1, 1)) and not is_reward_model(lambda **_: [])


def test_an_adapter_whose_head_was_not_saved_is_refused(tmp_path):
    _, path = train_adapter(tmp_path, tiny.tiny_model("qwen3"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(ValueError, match=r"adapter lacks the weights score.modules_to_save.default.weight.*random"):
        RewardModel(path)


def test_an_adapter_without_a_head_over_a_causal_lm_is_refused(tmp_path):
    _, path = train_adapter(tmp_path, tiny.tiny_model("qwen3"), task_type=None)
    with pytest.raises(ValueError, match=r"adapter lacks the weights score.weight.*random"):
        RewardModel(path)


def test_an_adapter_that_names_no_base_says_so(tmp_path):
    model = get_peft_model(tiny.tiny_reward_model("qwen3"), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not name its base model; set base_model_name_or_path"):
        RewardModel(str(tmp_path))
