"""Nothing that a run reads - models, checkpoints, data, recipes, completions - can make it execute code."""

import ast
import inspect
import os
import pickle
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import trl
import yaml

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.cli import main
from grpo_trl.rewards import RewardModel, resolve_reward
from tests.test_trainer import config, dataset, reward_vowels, trainer
from tests.tiny import save, tiny_model, tiny_tokenizer

SOURCE = Path(__file__).parents[1]
# The one pickle that is read: between a trainer and the child it started itself, over a socket that nobody else has.
PICKLE_ALLOWED = {"grpo_trl/rewards/isolation.py"}


def calls() -> list[tuple[str, ast.Call]]:
    """Every call in the package and the recipes: (file and dotted name, node)."""
    found = []
    for path in [*(SOURCE / "grpo_trl").rglob("*.py"), *(SOURCE / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((f"{path.relative_to(SOURCE)}:{ast.unparse(node.func)}", node))
    return found


def test_no_call_that_could_execute_what_it_reads():
    by_name = calls()
    assert len(by_name) > 500
    names = {name for name, _ in by_name}
    forbidden = ("eval", "exec", "os.system", "os.popen", "torch.load", "marshal.loads", "joblib.load", "yaml.load")
    assert [name for name in names if name.split(":")[1] in forbidden] == []
    pickles = {name.split(":")[0] for name in names if name.split(":")[1] in ("pickle.loads", "pickle.load")}
    assert pickles == PICKLE_ALLOWED
    shells = [name for name, node in by_name if any(keyword.arg == "shell" for keyword in node.keywords)]
    assert shells == []
    started = [node for name, node in by_name if name.split(":")[1].startswith("subprocess.")]
    assert started and all(not isinstance(node.args[0], ast.JoinedStr | ast.BinOp) for node in started)


def test_code_of_models_is_off_by_default():
    defaults = {cls.__name__: {f.name: f.default for f in fields(cls)} for cls in (GRPOConfig, trl.ModelConfig)}
    assert [options.get("trust_remote_code", False) for options in defaults.values()] == [False, False]
    assert inspect.signature(RewardModel).parameters["trust_remote_code"].default is False
    recipes = [yaml.safe_load(path.read_text()) for path in (SOURCE / "recipes").rglob("*.yaml")]
    assert recipes and not any(recipe.get("trust_remote_code") for recipe in recipes)


@pytest.fixture
def evil_code(tmp_path):
    """A model whose folder brings code; importing it leaves a mark."""
    folder = Path(save(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "evil"))
    mark = tmp_path / "executed"
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    text = (folder / "config.json").read_text().replace('"model_type": "qwen3"', '"model_type": "evil"')
    auto_map = '{"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}'
    (folder / "config.json").write_text(text.replace("{", '{"auto_map": ' + auto_map + ",", 1))
    return folder, mark


@pytest.mark.parametrize("role", ["policy", "reference", "reward"])
def test_code_in_a_models_folder_is_not_executed(tmp_path, evil_code, role, monkeypatch):
    folder, mark = evil_code
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    options = {"ref_model_name_or_path": str(folder)} if role == "reference" else {}
    rewards = [str(folder)] if role == "reward" else [reward_vowels]
    model = str(folder) if role == "policy" else tiny_model("qwen3")
    with pytest.raises((ValueError, OSError), match=r"trust_remote_code|evil"):
        GRPOTrainer(model, rewards, config(tmp_path, **options), dataset(), processing_class=tiny_tokenizer())
    assert not mark.exists()


class Bomb:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def test_a_pickle_in_the_place_of_weights_or_optimizer_is_not_executed(tmp_path, model_dir):
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(tmp_path / "works")))
    assert (tmp_path / "works").exists()  # the bomb does go off where a pickle is trusted
    folder = Path(save(tiny_model("qwen3"), tiny_tokenizer(), tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError, RuntimeError)):
        GRPOTrainer(str(folder), reward_vowels, config(tmp_path), dataset())
    trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1).train()
    torch.save(Bomb(mark), tmp_path / "run" / "checkpoint-1" / "optimizer.pt")
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert not mark.exists()


def test_a_recipe_cannot_make_python_objects(tmp_path, capsys):
    mark = tmp_path / "executed"
    (tmp_path / "evil.yaml").write_text(f"output_dir: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(tmp_path / "evil.yaml")])
    assert end.value.code == 2 and "could not determine a constructor" in capsys.readouterr().err
    assert not mark.exists()


def test_a_reward_imports_only_what_was_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("named_reward", "length_of", "other_reward"):
        (tmp_path / f"{name}.py").write_text(
            "import pathlib; pathlib.Path(__file__ + '.mark').touch()\ndef f(**k): pass"
        )
    resolve_reward("named_reward.f", max_completion_length=8)
    with pytest.raises(ValueError, match="'length_of' is unknown"):
        resolve_reward("length_of", max_completion_length=8)  # no dotted path: not looked for among modules
    assert [path.name for path in tmp_path.glob("*.mark")] == ["named_reward.py.mark"]


def test_paths_are_paths_and_not_words_of_a_shell(tmp_path):
    output = tmp_path / "a b; touch executed $(touch executed) `touch executed`"
    run = trainer(output, max_steps=1, save_strategy="steps", save_steps=1, save_epochs=True, plot_metrics=True)
    run.train()
    assert (output / "checkpoint-1").is_dir() and (output / "epoch_1").is_dir()
    assert not list(Path.cwd().glob("executed*")) and not list(tmp_path.rglob("executed"))


EVIL_TEXT = "[bold red]x[/nothing] <script>alert(1)</script> | \x1b[2J ${7*7} {{ 7*7 }} [a](javascript:x) $\\frac{x$"


def test_completions_are_shown_as_the_text_that_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("grpo_trl.collection.decode_completions", lambda group, tokenizer: [EVIL_TEXT] * len(group))
    run = trainer(
        tmp_path, max_steps=1, log_completions=True, num_completions_to_print=1, save_strategy="steps", save_steps=1,
        plot_metrics=True,
    )  # fmt: skip
    run.train()
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "\\x1b[2J" in shown  # nothing clears the user's terminal
    assert "[bold" in shown and "[/nothing]" in shown  # markup is text
    for card in tmp_path.rglob("README.md"):
        assert "script" not in card.read_text() and "javascript" not in card.read_text()
