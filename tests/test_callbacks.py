import math
import os
import random
import re
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset
from matplotlib import image
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerState, default_data_collator

from grpo_trl.callbacks import (
    EpochExportCallback,
    LossNoteCallback,
    MetricsPlotCallback,
    SyncReferenceCallback,
    log_completions,
    loss_note,
    metrics_plot,
    mix_into_reference,
    plot_metrics,
    read_parquet,
    recipe_yaml,
    write_parquet,
)
from grpo_trl.config import GRPOConfig
from grpo_trl.recipe import parse_recipe
from tests import tiny
from tests.fields import FIELD_NAMES

ROOT = Path(__file__).resolve().parent.parent


class PlainTrainer(Trainer):
    """transformers' Trainer with the two attributes of GRPOTrainer that exports read."""

    recipe: dict | None = None
    reward_names = ["accuracy"]


def make_args(folder, **options):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_steps": 1} | options
    defaults = {"save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-2}
    return GRPOConfig(output_dir=str(folder), use_cpu=True, **(defaults | options))


def make_trainer(folder, model, *, rows=8, **options):
    tokens = torch.randint(tiny.VOCAB_SIZE, (rows, 8), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = PlainTrainer(
        model=model,
        args=make_args(folder, **options),
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        data_collator=default_data_collator,
        processing_class=tiny.tiny_tokenizer(),
    )
    # what GRPOTrainer declares; here the loss is the model's own
    trainer.model_accepts_loss_kwargs = False
    return trainer


def history(steps):
    return [
        {
            "step": step,
            "loss": 1e-3 * step,
            "policy_loss": 2e-3,
            "kl": 0.1,
            "reward": 0.5,
            "reward_std": 0.2,
            "entropy": 1.0,
            "clip_ratio/region_mean": 0.01,
            "completions/mean_length": 20.0,
            "completions/min_length": 5.0,
            "completions/max_length": 30.0,
        }
        for step in range(1, steps + 1)
    ]


# ---- the plot ----


def panels(path):
    """The six panels of a picture, in reading order: the pixels that are not white, grey or black."""
    pixels = image.imread(path)[..., :3]
    coloured = (pixels.max(-1) - pixels.min(-1)) > 0.2
    rows, columns = np.array_split(coloured, 2, axis=0), 3
    return [part.sum() for row in rows for part in np.array_split(row, columns, axis=1)]


def test_a_run_draws_the_plot_at_every_log(tmp_path, qwen3, monkeypatch):
    drawn = []
    draw = metrics_plot.plot_metrics

    def counted(log_history, path, *, beta):
        draw(log_history, path, beta=beta)
        drawn.append((len(log_history), path.stat().st_size, beta))

    monkeypatch.setattr(metrics_plot, "plot_metrics", counted)
    trainer = make_trainer(tmp_path, qwen3, num_train_epochs=1)
    trainer.add_callback(MetricsPlotCallback())
    trainer.train()
    assert [entry[0] for entry in drawn] == [1, 2, 3]  # two steps and the summary
    assert all(size > 10_000 and beta == 0.01 for _, size, beta in drawn)
    assert image.imread(tmp_path / "training_metrics.png").shape == (680, 1300, 4)
    assert not list(tmp_path.glob("_*"))


def test_only_the_main_process_draws(tmp_path):
    state = TrainerState(log_history=history(2), is_world_process_zero=False)
    MetricsPlotCallback().on_log(make_args(tmp_path), state, None)
    assert not (tmp_path / "training_metrics.png").exists()


@pytest.mark.parametrize("steps", [1, 3, 100])
def test_every_panel_shows_its_metric(tmp_path, steps):
    plot_metrics(history(steps), tmp_path / "plot.png", beta=0.01)
    assert all(count > 5 for count in panels(tmp_path / "plot.png"))


PANELS = [
    ("loss", "policy_loss", "kl"),
    ("reward",),
    ("completions/mean_length", "completions/min_length"),
    ("entropy",),
    ("clip_ratio/region_mean",),
    ("kl",),
]


@pytest.mark.parametrize("panel", [1, 2, 3, 4, 5])
def test_a_missing_metric_leaves_its_panel_empty(tmp_path, panel):
    rows = [{name: value for name, value in row.items() if name not in PANELS[panel]} for row in history(3)]
    plot_metrics(rows, tmp_path / "plot.png", beta=0.01)
    counts = panels(tmp_path / "plot.png")
    assert counts[panel] == 0
    assert all(count > 5 for index, count in enumerate(counts) if index != panel)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_values_that_are_no_numbers_are_left_out(tmp_path, value):
    rows = [dict.fromkeys(row, value) | {"step": row["step"]} for row in history(3)]
    plot_metrics(rows, tmp_path / "plot.png", beta=0.01)
    assert panels(tmp_path / "plot.png") == [0] * 6


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    path = tmp_path_factory.mktemp("plot") / "plot.png"
    plot_metrics(history(5), path)
    return panels(path)


def test_single_nan_leaves_the_rest_of_its_curve(tmp_path, five_steps):
    rows = history(5)
    rows[2]["entropy"] = math.nan
    plot_metrics(rows, tmp_path / "gap.png")
    assert 0 < panels(tmp_path / "gap.png")[3] < five_steps[3]


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("eval_reward", True),
        ("eval_my_set_reward", True),
        ("eval_rewards/accuracy/mean", False),
    ],
)
def test_evaluation_rewards_are_drawn(tmp_path, five_steps, name, drawn):
    plot_metrics([*history(5), {"step": 3, name: 0.9}], tmp_path / "plot.png")
    assert bool(panels(tmp_path / "plot.png")[1] > five_steps[1] + 100) is drawn


def test_names_are_no_formulas(tmp_path, five_steps):
    plot_metrics([*history(5), {"step": 3, r"eval_a$\foo$_reward": 0.9}], tmp_path / "plot.png")
    assert panels(tmp_path / "plot.png")[1] > five_steps[1] + 100


def test_kl_part_is_drawn_with_its_weight(tmp_path, five_steps):
    plot_metrics(history(5), tmp_path / "with.png", beta=0.01)
    assert panels(tmp_path / "with.png")[0] > five_steps[0] + 50


def test_empty_history_and_the_users_backend(tmp_path):
    matplotlib.use("svg")
    plot_metrics([], tmp_path / "new" / "plot.png")
    assert panels(tmp_path / "new" / "plot.png") == [0] * 6
    assert matplotlib.get_backend() == "svg"


def test_running_mean_is_centred():
    assert metrics_plot._running_mean([0.0, 3.0, 6.0, 9.0], 2) == [1.5, 3.0, 6.0, 7.5]
    assert metrics_plot._running_mean([1.0, 2.0], 1) == [1.0, 2.0]


# ---- completions ----


def completion_rows():
    return [
        {"prompt": "1+1=", "completion": "2", "accuracy": 1.0, "style": None, "advantage": 0.5, "source": "a"},
        {"prompt": "1+1=", "completion": "3", "accuracy": 0.0, "style": 0.25, "advantage": -0.5, "source": 7},
    ]


def test_completions_are_printed_and_written(tmp_path, capsys):
    log_completions(completion_rows(), args=make_args(tmp_path), state=TrainerState(global_step=12))
    printed = capsys.readouterr().out
    assert "Step 12" in printed
    for text in ("1+1=", "accuracy", "Advantage", "-0.50", "nan", "source"):
        assert text in printed
    frame = pd.read_parquet(tmp_path / "completions" / "completions_00012.parquet")
    assert list(frame.columns) == ["step", "prompt", "completion", "accuracy", "style", "source", "advantage"]
    assert frame["step"].tolist() == [12, 12]
    assert frame["completion"].tolist() == ["2", "3"]
    assert frame["accuracy"].tolist() == [1.0, 0.0]
    assert frame["style"].isna().tolist() == [True, False]
    assert frame["source"].tolist() == ["a", "7"]  # no common type: text
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00012.parquet"]


@pytest.mark.parametrize("value", [{}, [{"arguments": {}}], 10**30, "half \ud800"])
def test_what_parquet_cannot_hold_is_written_as_text(tmp_path, value):
    write_parquet({"step": [1, 2], "extra": [value, None]}, tmp_path / "rows.parquet")
    text = str(value).encode("utf-8", "backslashreplace").decode()
    assert read_parquet(tmp_path / "rows.parquet") == {"step": [1, 2], "extra": [text, None]}


@pytest.mark.parametrize(("number", "printed"), [(0, 0), (1, 1), (None, 2)])
def test_number_of_printed_completions(tmp_path, capsys, number, printed):
    args = make_args(tmp_path, num_completions_to_print=number)
    log_completions(completion_rows(), args=args, state=TrainerState(global_step=1))
    assert capsys.readouterr().out.count("1+1=") == printed
    assert len(pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")) == 2


def test_conversations_are_written_as_such(tmp_path, capsys):
    rows = [
        {
            "prompt": [{"role": "user", "content": "hello"}],
            "completion": [{"role": "assistant", "content": "world"}],
            "accuracy": 1.0,
            "advantage": 0.0,
        }
    ]
    log_completions(rows, args=make_args(tmp_path), state=TrainerState(global_step=3))
    assert "ASSISTANT" in capsys.readouterr().out
    frame = pd.read_parquet(tmp_path / "completions" / "completions_00003.parquet")
    assert frame["completion"][0][0] == {"role": "assistant", "content": "world"}


@pytest.mark.parametrize("arguments", ["x=1", "[1]", [1], 3, {"q": 1}, None])
def test_whatever_was_sampled_is_printed(tmp_path, capsys, arguments):
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    answer = {
        "role": "assistant",
        "content": "half \ud83d[/b]",
        "tool_calls": [call],
        "reasoning_content": "so \x1b[2J",
    }
    rows = [
        {"prompt": [{"role": "user", "content": "hello"}], "completion": [answer], "accuracy": 1.0, "advantage": 0.0},
        {"prompt": "hello", "completion": [{"role": "assistant", "content": None, "tool_calls": None}],
         "accuracy": 1.0, "advantage": 0.0, "after [/think]": [{"role": None}]},
    ]  # fmt: skip
    log_completions(rows, args=make_args(tmp_path), state=TrainerState(global_step=3), mark="eval_[/x]")
    printed = capsys.readouterr().out
    for text in ("Step 3 eval_[/x]", "after [/think]", "half \\ud83d[/b]", "so \\x1b[2J", "search", "ASSISTANT"):
        assert text in printed


def test_a_terminal_that_does_not_know_unicode(tmp_path):
    program = (
        "from grpo_trl.callbacks import log_completions\n"
        "from types import SimpleNamespace as N\n"
        "row = {'prompt': 'a', 'completion': 'caf\\u00e9 \\ufffd', 'accuracy': 1.0, 'advantage': 0.0}\n"
        f"args = N(output_dir={str(tmp_path)!r}, generation_batch_size=1, num_completions_to_print=1, report_to=[])\n"
        "log_completions([row], args=args, state=N(global_step=1))\n"
    )
    own = {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=os.environ | own, capture_output=True, check=True)
    assert b"caf\xe9 \\ufffd" in run.stdout


def test_without_rows_nothing_is_written(tmp_path, capsys):
    log_completions([], args=make_args(tmp_path), state=TrainerState(global_step=3))
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "completions").exists()


def test_the_same_rows_are_printed_and_the_users_random_numbers_stay(tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "completion": "c", "accuracy": 1.0, "advantage": 0.0} for i in range(50)]
    args, state = make_args(tmp_path, num_completions_to_print=3), TrainerState(global_step=1)
    before = random.getstate()
    printed = []
    for _ in range(2):
        log_completions(rows, args=args, state=state)
        printed.append(re.findall(r"p\d+", capsys.readouterr().out))
    assert len(printed[0]) == 3 and printed[0] == printed[1] == sorted(printed[0], key=lambda name: int(name[1:]))
    assert random.getstate() == before


def test_an_evaluation_is_marked_and_no_more_of_it_printed_than_of_a_rollout(tmp_path, capsys):
    rows = [{"prompt": "1+1=", "completion": "2", "accuracy": 1.0, "advantage": None}] * 20
    args = make_args(tmp_path)
    log_completions(rows, args=args, state=TrainerState(global_step=3), mark="eval_hard")
    printed = capsys.readouterr().out
    assert "Step 3 eval_hard" in printed and printed.count("1+1=") == args.generation_batch_size == 4
    assert "Advantage" not in printed
    assert len(pd.read_parquet(tmp_path / "completions" / "completions_00003_eval_hard.parquet")) == 20


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """A module that stands for an experiment tracker with a run, and keeps what it is sent."""
    module = types.ModuleType(request.param)
    module.__spec__ = ModuleSpec(request.param, None)
    module.run, module.sent = object(), []
    module.Table, module.log = (lambda dataframe: dataframe), module.sent.append
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


@pytest.mark.parametrize("tracker", ["wandb"], indirect=True)
def test_trackers_get_half_a_character_as_text(tmp_path, tracker):
    rows = [{**row, "completion": "\ud83d"} for row in completion_rows()]
    args = make_args(tmp_path, report_to="wandb", num_completions_to_print=0)
    log_completions(rows, args=args, state=TrainerState(global_step=3))
    assert tracker.sent[0]["completions"]["completion"].tolist() == ["\\ud83d"] * 2


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("mark", ["", "eval"])
def test_trackers_get_the_table(tmp_path, tracker, unique, mark):
    rows = [*completion_rows(), {**completion_rows()[0], "prompt": "2+2="}]
    args = make_args(tmp_path, report_to=tracker.__name__, log_unique_prompts=unique)
    log_completions(rows, args=args, state=TrainerState(global_step=3), mark=mark)
    ((key, frame),) = [item for values in tracker.sent for item in values.items()]
    assert key == ("eval_completions" if mark else "completions")
    assert frame["prompt"].tolist() == (["1+1=", "2+2="] if unique else ["1+1=", "1+1=", "2+2="])
    assert frame["step"].tolist() == [3] * len(frame) and list(frame.columns)[-1] == "advantage"


def test_a_tracker_that_is_not_asked_for_gets_nothing(tmp_path, tracker):
    log_completions(completion_rows(), args=make_args(tmp_path), state=TrainerState(global_step=3))
    assert tracker.sent == []


@pytest.mark.parametrize("tracker", ["wandb"], indirect=True)
def test_wandb_without_a_run_gets_nothing(tmp_path, tracker):
    tracker.run = None
    args = make_args(tmp_path, report_to="wandb")
    log_completions(completion_rows(), args=args, state=TrainerState(global_step=3))
    assert tracker.sent == []


# ---- epoch folders ----


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that stands for the one that runs."""
    path = tmp_path / "my_training.py"
    path.write_text("print('training')\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
    return path


def test_every_epoch_leaves_a_model_its_recipe_and_its_script(tmp_path, qwen3, script):
    out = tmp_path / "out"
    trainer = make_trainer(out, qwen3, hub_token="hf_token_of_mine")
    trainer.add_callback(EpochExportCallback(trainer))
    trainer.train()
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["epoch_1", "epoch_2"]
    names = {path.name for path in (out / "epoch_2").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "train_script.py"}
    assert "training_args.bin" not in names
    assert (out / "epoch_2" / "train_script.py").read_text() == script.read_text()
    for path in (out / "epoch_2").iterdir():
        assert b"hf_token_of_mine" not in path.read_bytes(), path.name
    last = AutoModelForCausalLM.from_pretrained(out / "epoch_2").state_dict()
    assert all(torch.equal(last[name], value) for name, value in trainer.model.state_dict().items())
    first = AutoModelForCausalLM.from_pretrained(out / "epoch_1").state_dict()
    assert any(not torch.equal(first[name], value) for name, value in last.items())
    assert AutoTokenizer.from_pretrained(out / "epoch_2")("abc").input_ids == tiny.tiny_tokenizer()("abc").input_ids


def test_epochs_keep_their_numbers_after_a_resume(tmp_path, qwen3, script):
    out = tmp_path / "out"
    first = make_trainer(out, qwen3, num_train_epochs=2, save_strategy="steps", save_steps=3, max_steps=3)
    first.train()
    resumed = make_trainer(out, tiny.tiny_model(), num_train_epochs=3)
    resumed.add_callback(EpochExportCallback(resumed))
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-3"))  # within the second epoch
    assert sorted(path.name for path in out.glob("epoch_*")) == ["epoch_2", "epoch_3"]


def test_an_epoch_cut_by_max_steps_is_written(tmp_path, qwen3, script):
    trainer = make_trainer(tmp_path / "out", qwen3, max_steps=3)
    trainer.add_callback(EpochExportCallback(trainer))
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("*epoch_*")) == ["epoch_1", "epoch_2"]


def test_an_earlier_run_is_replaced_and_a_killed_one_cleaned_up(tmp_path, qwen3, script):
    for name in ("epoch_1", "_epoch_1"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "model-00001-of-00002.safetensors").write_text("old")
    trainer = make_trainer(tmp_path / "out", qwen3, num_train_epochs=1)
    trainer.add_callback(EpochExportCallback(trainer))
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("*epoch_*")] == ["epoch_1"]
    assert not (tmp_path / "out" / "epoch_1" / "model-00001-of-00002.safetensors").exists()


def test_an_incomplete_folder_is_not_seen(tmp_path, qwen3, script, monkeypatch):
    trainer = make_trainer(tmp_path / "out", qwen3, num_train_epochs=1)
    trainer.add_callback(EpochExportCallback(trainer))
    full = OSError(28, "No space left on device")  # after the weights are written
    monkeypatch.setattr("grpo_trl.callbacks.epoch_export.recipe_yaml", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("*epoch_*")] == ["_epoch_1"]


def test_the_script_is_the_one_that_ran_byte_for_byte(tmp_path, qwen3, script):
    trainer = make_trainer(tmp_path / "out", qwen3, num_train_epochs=1)
    script.write_bytes(text := b"# -*- coding: latin-1 -*-\n# gr\xfc\xdfe\n")
    trainer.add_callback(EpochExportCallback(trainer))
    script.write_text("# edited while the run goes on")
    trainer.train()
    assert (tmp_path / "out" / "epoch_1" / "train_script.py").read_bytes() == text


def test_lora_folder_holds_the_trained_adapter_only(tmp_path, model_dir, script):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("ref", model.peft_config["default"])
    trainer = make_trainer(tmp_path / "out", model, num_train_epochs=1)
    trainer.add_callback(EpochExportCallback(trainer))
    trainer.train()
    folder = tmp_path / "out" / "epoch_1"
    assert (folder / "adapter_model.safetensors").exists()
    assert (folder / "adapter_config.json").exists()
    assert not (folder / "ref").exists()
    assert not (folder / "model.safetensors").exists()
    assert AutoConfig.from_pretrained(folder / "base_model").model_type == "qwen3"
    batch = {"input_ids": torch.arange(20)[None]}
    expected = trainer.model.eval()(**batch).logits
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    assert not torch.equal(plain(**batch).logits, expected)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(**batch).logits, expected)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, str(folder))(**batch).logits, expected)


def test_an_adapter_of_another_name_is_loaded_from_the_folder(tmp_path, model_dir, script, caplog):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora, adapter_name="policy")
    trainer = make_trainer(tmp_path / "out", model, num_train_epochs=1)
    trainer.add_callback(EpochExportCallback(trainer))
    trainer.train()
    folder, batch = tmp_path / "out" / "epoch_1", {"input_ids": torch.arange(20)[None]}
    assert not (folder / "policy").exists() and "no safetensors" not in caplog.text
    expected = trainer.model.eval()(**batch).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(**batch).logits, expected)


def test_a_push_leaves_epoch_folders_out(tmp_path, qwen3, script):
    trainer = make_trainer(tmp_path / "out", qwen3, num_train_epochs=1)
    trainer.args.push_to_hub = True  # by itself it would look for the Hub
    EpochExportCallback(trainer).on_epoch_end(trainer.args, TrainerState(epoch=1.0), None)
    assert [path.name for path in (tmp_path / "out").glob("*epoch_*")] == ["_epoch_1"]


def test_without_a_script_one_sentence_and_no_file(tmp_path, qwen3, monkeypatch, caplog):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    trainer = make_trainer(tmp_path, qwen3)
    trainer.add_callback(EpochExportCallback(trainer))
    trainer.train()
    assert (tmp_path / "epoch_2" / "recipe.yaml").exists()
    assert not (tmp_path / "epoch_2" / "train_script.py").exists()
    assert [record.message for record in caplog.records if "train_script.py" in record.message] == [
        "No train_script.py in the epoch folders: this run was not started from a script."
    ]


def test_script_of_the_command_repeats_the_run(tmp_path, qwen3, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/usr/bin/grpo-trl", raising=False)
    trainer = make_trainer(tmp_path, qwen3, num_train_epochs=1)
    trainer.recipe = {"model_name_or_path": "no/such-model", "reward_funcs": ["no_such_reward"]}
    trainer.add_callback(EpochExportCallback(trainer))
    trainer.train()
    command = [sys.executable, str(tmp_path / "epoch_1" / "train_script.py")]
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(root)})
    # it reads the recipe beside it, and says what that lacks
    assert "training data: expected either train_datasets" in run.stderr
    assert run.returncode == 2


# ---- recipe.yaml ----


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {"variant": "dapo"}),
        ({"variant": "dapo"}, {"variant": "grpo", "beta": 0.1}),
        ({"loss_type": "dapo"}, {"loss_type": "dr_grpo"}),
        ({}, {"use_bias_correction_kl": False}),
        ({}, {"epsilon": 0.1}),
        ({}, {"num_iterations": 4, "gradient_accumulation_steps": 2}),
        ({}, {"cache_implementation": "static"}),
        ({}, {"save_strategy": "no"}),
        ({}, {"gradient_checkpointing": False}),
        ({"gradient_checkpointing": False}, {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_a_change_of_a_saved_recipe_is_that_of_the_run(tmp_path, qwen3, options, changes):
    trainer = make_trainer(tmp_path, qwen3, **options)
    values = {name: value for name, value in yaml.safe_load(recipe_yaml(trainer)).items() if name in FIELD_NAMES}
    fresh = make_trainer(tmp_path, qwen3, **options | changes)
    assert GRPOConfig(**values | changes).to_dict() == fresh.args.to_dict()


def as_config(recipe: str) -> GRPOConfig:
    return GRPOConfig(**{name: value for name, value in yaml.safe_load(recipe).items() if name in FIELD_NAMES})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "deepseekmath", "beta": 0.0},
        {"loss_type": "dr_grpo", "delta": 4.0},
        {"gradient_accumulation_steps": 2, "generation_batch_size": 16, "lr_scheduler_type": "cosine"},
        {"save_steps": 0.5, "generation_kwargs": {"no_repeat_ngram_size": 3}, "reward_weights": [0.5]},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"eval_strategy": "epoch"},
    ],
)
def test_recipe_gives_the_same_config_again(tmp_path, qwen3, options, caplog):
    trainer = make_trainer(tmp_path, qwen3)
    trainer.args = make_args(tmp_path, **options)
    assert as_config(recipe_yaml(trainer)).to_dict() == trainer.args.to_dict()
    assert "Without effect" not in caplog.text


def test_recipe_holds_the_resolved_objective_and_what_was_changed(tmp_path, qwen3):
    trainer = make_trainer(tmp_path, qwen3, variant="deepseekmath", epsilon=0.3)
    trainer.recipe = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "train_datasets": [{"path": Path("train.jsonl"), "type": "jsonl", "input": "question"}],
        "reward_funcs": ["accuracy"],
    }
    recipe = recipe_yaml(trainer)
    values = yaml.safe_load(recipe)
    assert values["model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert values["train_datasets"] == [{"path": "train.jsonl", "type": "jsonl", "input": "question"}]
    assert (values["variant"], values["epsilon"]) == ("deepseekmath", 0.3)
    # what follows from these is there to be read, and gives way to another variant
    assert {"epsilon_high", "scale_rewards", "beta"}.isdisjoint(values)
    assert all(line in recipe for line in ("# epsilon_high: 0.3\n", "# scale_rewards: group\n", "# beta: 0.04\n"))
    assert values["learning_rate"] == 1e-2
    assert "temperature" not in values  # as by default
    assert "accelerator_config" not in values
    trainer.args.resume_from_checkpoint = "true"  # how this run was started, not what it is
    assert "resume_from_checkpoint" not in recipe_yaml(trainer)
    assert "arXiv 2402.03300" in recipe


def test_recipe_is_read_by_the_command(tmp_path, qwen3):
    trainer = make_trainer(tmp_path, qwen3)
    trainer.recipe = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "train_datasets": [{"path": "train.jsonl", "type": "jsonl", "input": "question"}],
        "reward_funcs": ["accuracy"],
    }
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(trainer))
    script_args, args, model_args = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert args.to_dict() == trainer.args.to_dict()
    assert model_args.model_name_or_path == "Qwen/Qwen3-0.6B"
    assert script_args.train_datasets == trainer.recipe["train_datasets"]
    assert script_args.reward_funcs == ["accuracy"]


def test_recipe_without_sections_names_them_in_comments(tmp_path, qwen3):
    recipe = recipe_yaml(make_trainer(tmp_path, qwen3))
    assert "# model: Qwen3ForCausalLM\n# rewards: accuracy\n# data: given in code\n" in recipe
    assert set(yaml.safe_load(recipe)) <= FIELD_NAMES


def test_recipe_holds_no_secrets_and_nothing_that_yaml_cannot_hold(tmp_path, qwen3):
    trainer = make_trainer(tmp_path, qwen3, hub_token="hf_token_of_mine")
    trainer.args.model_init_kwargs = {"token": "hf_token_of_mine", "dtype": "bfloat16"}
    trainer.args.generation_kwargs = {"stopping": object()}
    recipe = recipe_yaml(trainer)
    assert "token_of_mine" not in recipe
    assert yaml.safe_load(recipe)["model_init_kwargs"] == {"dtype": "bfloat16"}
    assert "# generation_kwargs: a dict, which YAML cannot hold; set it in code" in recipe


# ---- the reference that follows ----


def test_mix_is_that_of_tr_dpo():
    policy, reference = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    policy.weight.data = torch.tensor([[1.0, 3.0]])
    reference.weight.data = torch.tensor([[2.0, -1.0]])
    mix_into_reference(policy, reference, 0.6)
    torch.testing.assert_close(reference.weight.data, torch.tensor([[0.4 * 2 + 0.6 * 1, 0.4 * -1 + 0.6 * 3]]))
    assert policy.weight.tolist() == [[1.0, 3.0]]
    mix_into_reference(policy, reference, 1.0)
    assert torch.equal(policy.weight, reference.weight)


def test_a_half_precision_reference_is_rounded_once():
    policy, reference = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    expected = 0.9 * reference.to(torch.bfloat16).weight.float() + 0.1 * policy.weight.data
    mix_into_reference(policy, reference, 0.1)
    assert reference.weight.dtype == torch.bfloat16
    assert torch.equal(reference.weight, expected.to(torch.bfloat16))


def test_reference_follows_at_its_steps_only(tmp_path):
    policy, reference = tiny.tiny_model(), tiny.tiny_model().requires_grad_(False)
    callback, seen = SyncReferenceCallback(reference, 0.5, 2), []
    start = reference.lm_head.weight.clone()
    on_step_end = callback.on_step_end

    def watched(args, state, control, model=None, **kwargs):
        before = reference.lm_head.weight.clone()
        on_step_end(args, state, control, model=model, **kwargs)
        if not torch.equal(before, reference.lm_head.weight):
            torch.testing.assert_close(reference.lm_head.weight, (before + model.lm_head.weight) / 2)
            seen.append(state.global_step)

    callback.on_step_end = watched
    trainer = make_trainer(tmp_path, policy)
    trainer.add_callback(callback)
    trainer.train()
    assert seen == [2, 4]
    assert not torch.equal(start, reference.lm_head.weight)
    assert not reference.lm_head.weight.requires_grad


def test_reference_that_cannot_follow_is_refused_before_the_first_step(tmp_path, qwen3):
    trainer = make_trainer(tmp_path, qwen3)
    trainer.add_callback(SyncReferenceCallback(tiny.tiny_model(hidden_size=16), 0.5, 2))
    with pytest.raises(ValueError, match=r"embed_tokens.weight: \(263, 16\) in the reference, \(263, 32\)"):
        trainer.train()
    assert trainer.state.global_step == 0
    in_8_bit = tiny.tiny_model().requires_grad_(False)  # of the same shapes
    in_8_bit.lm_head.weight.data = in_8_bit.lm_head.weight.data.to(torch.int8)
    with pytest.raises(ValueError, match=r"lm_head.weight: None in the reference.*unquantised copy"):
        SyncReferenceCallback(in_8_bit, 0.5, 2).on_train_begin(None, None, None, model=qwen3)


def test_a_reference_with_offloaded_weights_is_refused_before_the_first_step(qwen3):
    offloaded = tiny.tiny_model()
    offloaded.lm_head.to("meta")
    with pytest.raises(ValueError, match="cannot follow the policy in weights that ref_device has put on the disk"):
        SyncReferenceCallback(offloaded, 0.5, 2).on_train_begin(None, None, None, model=qwen3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reference_on_another_device_follows():
    policy, reference = torch.nn.Linear(8, 8).cuda(), torch.nn.Linear(8, 8)
    mix_into_reference(policy, reference, 1.0)
    assert torch.equal(policy.weight.cpu(), reference.weight)


# ---- the note on the loss ----


@pytest.mark.parametrize(
    ("logs", "noted"),
    [
        ({"loss": 0.0}, True),
        ({"loss": -3e-4}, True),
        ({"loss": 0.01}, False),
        ({"loss": -2.0}, False),
        ({"loss": math.nan}, False),
        ({"eval_reward": 0.0}, False),
        ({"loss": 0.0, "grad_norm": 0.3}, True),
        ({"loss": 0.0, "grad_norm": 0.0}, False),  # nothing cancels
    ],
)
def test_loss_note(logs, noted):
    assert (loss_note(logs) is not None) is noted


def test_loss_note_is_said_once(tmp_path, caplog):
    callback = LossNoteCallback()
    for logs in ({"loss": 1.0}, {"loss": 1e-4}, {"loss": 1e-5}):
        callback.on_log(make_args(tmp_path), TrainerState(is_world_process_zero=False), None, logs=logs)
    assert not caplog.records
    for logs in ({"loss": 1.0}, {"loss": 1e-4}, {"loss": 1e-5}):
        callback.on_log(make_args(tmp_path), TrainerState(), None, logs=logs)
    assert len(caplog.records) == 1
    assert "loss=0.0001 is near 0 by construction" in caplog.text
    caplog.clear()
    LossNoteCallback().on_log(make_args(tmp_path, variant="cispo"), TrainerState(), None, logs={"loss": 1e-4})
    assert not caplog.records
    LossNoteCallback().on_log(make_args(tmp_path), TrainerState(), None, logs={"loss": 1e-4})
    assert "grad_norm" in caplog.text
