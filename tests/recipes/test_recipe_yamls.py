from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from trl.trainer.model_config import ModelConfig

from grpo_trl.algorithm import VARIANTS
from grpo_trl.data import parse_entries
from grpo_trl.placement import resolve_device_map
from grpo_trl.recipe import RecipeParser, parse_recipe
from grpo_trl.rewards import REWARDS, resolve_reward
from grpo_trl.rollouts import ENGINES

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
YAMLS = sorted(path.relative_to(RECIPES) for path in RECIPES.rglob("*.yaml"))
# run by recipes/grpo.py; the demo builds its model and data itself, and its YAML holds GRPOConfig's fields only
COMPLETE = [path for path in YAMLS if path.parts[0] != "demo"]
SECTIONS = ["# Model", "# Data", "# Rewards", "# Training", "# Outputs"]


def arguments(path):
    return ["--config", str(RECIPES / path), "--bf16", "false"]


def test_there_are_recipes():
    assert {str(path) for path in COMPLETE} >= {
        "qwen3_0.6b_seed/grpo.yaml",
        "qwen3_0.6b_gsm8k/grpo.yaml",
        "qwen3_0.6b_gsm8k/grpo_lora.yaml",
    }


@pytest.mark.parametrize("path", YAMLS, ids=str)
def test_recipe_is_parsed_and_names_existing_parts(path):
    script_args, args, _ = RecipeParser().parse_args_and_config(arguments(path))
    assert args.variant in VARIANTS
    assert args.rollout_engine in ENGINES
    for name in script_args.reward_funcs or []:
        assert name in REWARDS or callable(resolve_reward(name, max_completion_length=args.max_completion_length))


@pytest.mark.parametrize("path", COMPLETE, ids=str)
def test_recipe_is_complete(path):
    script_args, args, model_args = parse_recipe(arguments(path))
    assert parse_entries(script_args.train_datasets)
    assert script_args.rewards and model_args.model_name_or_path
    assert args.reward_weights is None or len(args.reward_weights) == len(script_args.rewards)
    assert args.output_dir.startswith("outputs/")
    assert args.per_device_train_batch_size * args.steps_per_generation % args.num_generations == 0
    if args.load_best_model_at_end:
        assert args.eval_strategy == args.save_strategy and args.save_steps % args.eval_steps == 0
        assert args.metric_for_best_model == "eval_reward" and args.greater_is_better


@pytest.mark.parametrize("path", COMPLETE, ids=str)
def test_recipe_has_its_sections_in_order(path):
    text = (RECIPES / path).read_text()
    places = [text.find(f"\n{section}") for section in SECTIONS]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("path", COMPLETE, ids=str)
def test_recipe_has_no_key_twice(path):
    keys = [line.split(":")[0] for line in (RECIPES / path).read_text().splitlines() if line[:1].isalpha()]
    assert sorted(keys) == sorted(set(keys)) == sorted(yaml.safe_load((RECIPES / path).read_text()))


@pytest.mark.parametrize("path", YAMLS, ids=str)
def test_recipe_is_in_the_table(path):
    assert f"]({path.as_posix()})" in (RECIPES / "README.md").read_text()


def test_the_seeds_hyper_parameters():
    script_args, args, model_args = parse_recipe(arguments("qwen3_0.6b_seed/grpo.yaml"))
    assert model_args.model_name_or_path == "Qwen/Qwen3-0.6B"
    assert script_args.rewards == ["OpenAssistant/reward-model-deberta-v3-large-v2"]
    entry = {"path": "your_dataset.parquet", "type": "parquet", "input": "question", "output": "answer"}
    assert script_args.train_datasets == [entry]
    assert (args.generation_batch_size // args.num_generations, args.num_generations) == (
        2,
        4,
    )  # BATCH_SIZE, GROUP_SIZE
    assert (args.num_iterations, args.learning_rate) == (4, 1e-6)
    assert (args.epsilon, args.epsilon_high, args.beta) == (0.2, 0.2, 0.01)
    assert (args.scale_rewards, args.token_weighting) == ("batch_relative", "token")
    assert (args.ref_device, args.reward_device) == ("cuda:1", "cuda:1")


@pytest.mark.parametrize("name", ["ref_device", "reward_device"])
def test_the_seed_recipe_runs_without_a_gpu_when_its_devices_are_named_anew(name):
    argv = [*arguments("qwen3_0.6b_seed/grpo.yaml"), "--use_cpu", "true"]
    args = parse_recipe(argv)[1]
    with pytest.raises(ValueError, match="'cuda:1' does not exist"):
        resolve_device_map(getattr(args, name), args.device, num_gpus=0)
    args = parse_recipe([*argv, f"--{name}", "same"])[1]
    assert resolve_device_map(getattr(args, name), args.device, num_gpus=0) == {"": args.device}
    assert f"--{name} same" in (RECIPES / "README.md").read_text()


def test_lora_differs_from_full_in_the_adapter_only():
    full, lora = (
        yaml.safe_load((RECIPES / "qwen3_0.6b_gsm8k" / name).read_text()) for name in ("grpo.yaml", "grpo_lora.yaml")
    )
    model_fields = {f.name for f in fields(ModelConfig)}
    changed = {name for name in full | lora if full.get(name) != lora.get(name)}
    assert changed - model_fields == {"learning_rate", "output_dir"}
    assert lora["use_peft"] is True
