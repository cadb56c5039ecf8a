"""The main job on real questions: GRPO on GSM8K through a data entry, with a reward model and a verifiable
reward, by `recipes/grpo.py`: on one rank, on two, and with an adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.tiny import save, tiny_model, tiny_reward_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["one rank", *(pytest.param(kind, marks=pytest.mark.ci) for kind in ("two ranks", "lora"))]
)
def test_gsm8k(tmp_path, gsm8k, kind):
    policy = save(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "policy")
    judge = save(tiny_reward_model(), tiny_tokenizer(chat=False, pair=True), tmp_path / "deberta")
    output = tmp_path / "out"
    recipe = {
        "model_name_or_path": policy,
        "train_datasets": [
            {"path": str(gsm8k), "type": "jsonl", "input": "question", "output": "answer", "split": "train[:64]"}
        ],
        "reward_model_name_or_path": judge,
        "reward_funcs": ["accuracy", "answer_format"],
        "reward_weights": [1.0, 1.0, 0.5],
        "per_device_train_batch_size": 8 if kind == "two ranks" else 16,
        "max_completion_length": 24,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 8,
        "log_completions": True,
        "num_completions_to_print": 2,
        "save_strategy": "epoch",
        "use_cpu": True,
        "report_to": "none",
        "output_dir": str(output),
    } | ({"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]} if kind == "lora" else {})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch = [sys.executable]
    if kind == "two ranks":
        launch += ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_two_ranks.yaml"]
    command = [*launch, "recipes/grpo.py", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Completion" in done.stdout  # the table of sampled completions

    last = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * 64 // 4 * 4 and state["epoch"] == 2  # epochs x rollouts of 4 prompts x 4 passes
    first = next(entry for entry in state["log_history"] if "reward" in entry)
    assert {
        "rewards/deberta/mean",
        "rewards/accuracy/mean",
        "rewards/answer_format/mean",
        "kl",
        "entropy",
    } <= first.keys()
    assert (output / "training_metrics.png").stat().st_size > 20_000
    assert list((output / "completions").glob("*.parquet"))
    for folder in [*output.glob("checkpoint-*"), output / "epoch_1", output / "epoch_2"]:
        AutoModelForCausalLM.from_pretrained(folder)
    for name in ("config.json", "recipe.yaml", "train_script.py"):
        place = output / "epoch_2" / ("base_model" if kind == "lora" and name == "config.json" else "")
        assert (place / name).exists(), name
    assert (output / "epoch_2" / "train_script.py").read_text() == (ROOT / "recipes" / "grpo.py").read_text()
