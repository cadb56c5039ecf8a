import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.model_config import ModelConfig

from grpo_trl import cli, commands
from grpo_trl.algorithm import VARIANTS
from grpo_trl.config import GOVERNED, GRPOConfig
from grpo_trl.manifest import ResumeError
from grpo_trl.recipe import REFUSED_SCRIPT_OPTIONS, RecipeParser, ScriptArguments, parse_recipe
from grpo_trl.refused import REFUSED, UNUSED
from grpo_trl.rewards.registry import REWARDS, TRL_NAMES

ROOT = Path(__file__).resolve().parent.parent
ENTRY = {"path": "train.jsonl", "type": "jsonl", "input": "question", "output": "answer"}
RECIPE = {
    "model_name_or_path": "some/model",
    "train_datasets": [ENTRY],
    "reward_funcs": ["accuracy"],
    "learning_rate": 1e-5,
    "report_to": "none",
}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe (RECIPE with changes; None removes a field) and returns the arguments that name it."""

    def write_recipe(**changes):
        path = tmp_path / "recipe.yaml"
        recipe = {name: value for name, value in (RECIPE | changes).items() if value is not None}
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out")} | recipe))
        return ["--config", str(path)]

    return write_recipe


# ---- parsing ----


@pytest.mark.parametrize("null", [["--system_prompt", "null"], ["--system_prompt=None"]])
def test_null_on_the_command_line(write, null):
    recipe = write(system_prompt="Be brief.", generation_kwargs={"min_new_tokens": 2}, num_generations=8)
    _, args, _ = parse_recipe([*recipe, *null, "--generation_kwargs", "null", "--num_generations", "4"])
    assert (args.system_prompt, args.generation_kwargs, args.num_generations) == (None, None, 4)
    script_args, _, _ = parse_recipe([*recipe, "--reward_funcs", "none", "accuracy"])  # one of two words
    assert script_args.reward_funcs == ["none", "accuracy"]
    with pytest.raises(ValueError, match="invalid int value: 'null'"):  # a field that cannot be
        parse_recipe([*recipe, "--num_generations", "null"])


def test_words_that_yaml_reads_as_something_else(write):
    with pytest.raises(ValueError, match=r'save_strategy=False is unknown; .*"no" in quotes: without them YAML'):
        parse_recipe(write(save_strategy=False))


def test_what_users_take_a_field_for(write):
    with pytest.raises(ValueError, match=r"'model' is no field; did you mean model_name_or_path\?"):
        parse_recipe([*write(), "--model", "x"])


def test_the_package_is_the_command_and_helps_at_once():
    command = [sys.executable, "-X", "importtime", "-m", "grpo_trl", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "train" in run.stdout
    assert "grpo_trl.cli" in run.stderr and "torch" not in run.stderr  # whose import takes seconds


def test_yaml_gives_all_three_groups_of_fields(write):
    script_args, args, model_args = parse_recipe(write(num_generations=8, lora_r=4))
    assert script_args.train_datasets == [ENTRY] and script_args.rewards == ["accuracy"]
    assert (args.learning_rate, args.num_generations) == (1e-5, 8)
    assert (model_args.model_name_or_path, model_args.lora_r) == ("some/model", 4)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lora_r", [8], "a whole number"),
        ("lora_dropout", [0.1], "a number"),
        ("load_in_4bit", [True], "True or False"),
        ("model_name_or_path", 5, "text or nothing"),
    ],
)
def test_a_value_of_the_models_fields_has_their_type(write, name, value, expected):
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} .*: expected {expected}"):
        parse_recipe(write(**{name: value}))


@pytest.mark.parametrize(
    "modules", ["all-linear", ["all-linear"], ["q_proj", "v_proj"], ["q_proj"], [r".*q_proj"], None]
)
def test_modules_of_an_adapter(write, modules):
    # a pattern may stand for all
    expected = modules[0] if modules in (["all-linear"], [r".*q_proj"]) else modules
    assert parse_recipe(write(lora_target_modules=modules, model_revision=None))[2].lora_target_modules == expected


def test_options_of_an_adapter_without_one_are_said_to_have_no_effect(write, caplog):
    with caplog.at_level("WARNING", logger="grpo_trl"):
        parse_recipe(write(lora_r=4, use_dora=True))
        parse_recipe(write(lora_r=4, use_peft=True))
        parse_recipe(write())
    said = "lora_r, use_dora: without effect, all weights are trained; set use_peft: true."
    assert [record.getMessage() for record in caplog.records] == [said]


def test_command_line_wins_over_yaml(write):
    argv = write(num_generations=8, plot_metrics=True)
    argv += ["--learning_rate", "2e-6", "--num-generations=4", "--no_plot_metrics", "--dtype", "bfloat16"]
    argv += ["--reward_funcs", "exact_match", "think_format", "--reward_weights", "1", "0.5"]
    script_args, args, model_args = parse_recipe(argv)
    assert (args.learning_rate, args.num_generations, args.plot_metrics) == (2e-6, 4, False)
    assert script_args.rewards == ["exact_match", "think_format"] and args.reward_weights == [1.0, 0.5]
    assert model_args.dtype == "bfloat16"


def test_config_flag_with_equals_sign(write):
    _, path = write()
    assert parse_recipe([f"--config={path}"])[1].learning_rate == 1e-5


def test_every_field_has_an_option():
    options = set(RecipeParser()._option_string_actions)
    named = {f"--{f.name}" for cls in (ScriptArguments, GRPOConfig, ModelConfig) for f in fields(cls) if f.init}
    assert named <= options


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_devices_from_the_command_line(write, device):
    args = parse_recipe([*write(), "--ref_device", device, "--reward_device", device])[1]
    assert (args.ref_device, args.reward_device) == (device, device)


@pytest.mark.parametrize(("given", "expected"), [("group", "group"), ("batch_relative", "batch_relative")])
def test_scale_rewards_from_the_command_line(write, given, expected):
    assert parse_recipe([*write(), "--scale_rewards", given])[1].scale_rewards == expected


def test_data_as_json_on_the_command_line(write):
    other = ENTRY | {"path": "other.parquet", "type": "parquet", "split": "train[:64]"}
    named = {"easy": [ENTRY], "hard": [other]}
    argv = ["--train_datasets", json.dumps([other]), "--eval_datasets", json.dumps(named)]
    script_args, *_ = parse_recipe([*write(), *argv])
    assert script_args.train_datasets == [other] and script_args.eval_datasets == named


def test_data_that_is_not_json(write):
    with pytest.raises(ValueError, match=r"--train_datasets takes JSON, e.g. .*; got 'train.jsonl'"):
        parse_recipe([*write(), "--train_datasets", "train.jsonl"])


def test_reward_model_comes_first_and_one_name_is_a_list(write):
    script_args, *_ = parse_recipe(write(reward_funcs="accuracy", reward_model_name_or_path="some/rm"))
    assert script_args.rewards == ["some/rm", "accuracy"]


def test_resume_from_the_last_checkpoint(write):
    assert parse_recipe([*write(), "--resume_from_checkpoint", "true"])[1].resume_from_checkpoint is True
    assert parse_recipe([*write(), "--resume_from_checkpoint", "false"])[1].resume_from_checkpoint is False
    assert parse_recipe([*write(), "--resume_from_checkpoint", "out/c-1"])[1].resume_from_checkpoint == "out/c-1"


@pytest.mark.parametrize("value", ['{"a": ', "[1]"])
@pytest.mark.parametrize("name", ["chat_template_kwargs", "lr_scheduler_kwargs"])
def test_json_that_is_no_mapping_names_its_field(write, name, value):
    with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))} must be a mapping"):
        parse_recipe([*write(), f"--{name}", value])


# ---- refusals ----


@pytest.mark.parametrize("name", REFUSED)
def test_refused_trl_option_names_its_remedy(write, name):
    remedy = REFUSED[name][1]
    plain = write()
    for argv in ([*plain, f"--{name}", "unusual"], [*plain, f"--{name}=unusual"], write(**{name: "unusual"})):
        with pytest.raises(ValueError) as error:
            parse_recipe(argv)
        assert f"{name}='unusual'" in str(error.value) and remedy in str(error.value)


def test_harmless_trl_options_are_dropped(write):
    harmless = {"use_transformers_paged": False, "router_aux_loss_coef": 0.0, "top_entropy_quantile": 1.0}
    args = parse_recipe(write(**harmless))[1]
    assert not hasattr(args, "use_transformers_paged")
    argv = ["--use_vllm", "false", "--vllm_server_port=8001", "--router_aux_loss_coef", "none", "--max_steps", "3"]
    assert parse_recipe([*write(), *argv])[1].max_steps == 3


def test_a_bare_refused_flag_means_true(write):
    with pytest.raises(ValueError, match=r"use_transformers_paged=True.*rollout_engine"):
        parse_recipe([*write(), "--use_transformers_paged", "--max_steps", "3"])


def test_misspelt_fields_name_the_closest_one_all_in_one_error(write):
    with pytest.raises(ValueError) as error:
        parse_recipe([*write(num_generation=4), "--learning_rat", "1", "--zzzz"])
    text = str(error.value)
    assert "'num_generation' is no field; did you mean num_generations?" in text
    assert "'learning_rat' is no field; did you mean learning_rate?" in text
    assert "'zzzz' is no field; `grpo-trl train --help` lists the fields." in text


def test_options_of_trls_script(write):
    for name, remedy in REFUSED_SCRIPT_OPTIONS.items():
        with pytest.raises(ValueError) as error:
            parse_recipe(write(**{name: True}))
        assert remedy in str(error.value)
        default = False if name in ("streaming", "ignore_bias_buffers") else None  # TRL's
        parse_recipe(write(**{name: default}))


def test_trl_script_options_are_ours_or_refused():
    ours = {f.name for f in fields(ScriptArguments) if f.init}
    theirs = {f.name for cls in (trl.ScriptArguments, trl.DatasetMixtureConfig) for f in fields(cls)}
    assert theirs <= ours | set(REFUSED_SCRIPT_OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"reward_funcs": None}, "no reward: set reward_funcs"),
        ({"train_datasets": None}, "got neither"),
        ({"dataset_name": "some/data"}, "got both"),
        ({"eval_strategy": "epoch"}, "needs data: set eval_datasets"),
        ({"train_datasets": [ENTRY | {"typ": "csv"}]}, "unknown key 'typ'"),
        (
            {"eval_datasets": {"hard": [ENTRY | {"type": "xml"}]}},
            r"- eval_datasets\[hard\]:\n  - entry 1: unknown type 'xml'",
        ),
        ({"num_generations": "four"}, "num_generations.*invalid int value: 'four'"),
        ({"num_generations": 3}, "num_generations=3 must divide the 8 completions"),
        ({"dtype": "float8"}, "dtype='float8' is unknown; use one of auto, bfloat16"),
    ],
)
def test_what_a_recipe_cannot_be(write, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe(write(**changes))


def test_several_problems_in_one_error(write):
    with pytest.raises(ValueError) as error:
        parse_recipe(write(model_name_or_path=None, reward_funcs=None, train_datasets=None))
    assert str(error.value).count("\n- ") == 3


# ---- the command ----


def test_usage_errors_end_with_code_2_and_the_message_alone(write, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *write(learning_rat=1)])
    assert exit_.value.code == 2
    assert "did you mean learning_rate?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_datasets": [ENTRY | {"path": "none.jsonl"}]}, "train_datasets: {folder}/none.jsonl: no such file"),
        (
            {"eval_datasets": [ENTRY | {"path": "none.jsonl"}], "eval_strategy": "epoch"},
            "eval_datasets: {folder}/none.jsonl: no such file (current directory: {folder}).",
        ),
        (
            {"eval_datasets": {"hard": [ENTRY | {"path": "none.jsonl"}]}, "eval_strategy": "epoch"},
            "eval_datasets[hard]: {folder}/none.jsonl: no such file",
        ),
        (
            {"model_name_or_path": "models/of/mine"},
            "model 'models/of/mine': no such folder (current directory: {folder});",
        ),
        ({"reward_funcs": ["acuracy"]}, "Reward 'acuracy' is unknown"),
        ({"model_name_or_path": "nobody/nothing"}, "model 'nobody/nothing': its tokenizer cannot be loaded: "),
        ({"reward_funcs": ["nobody/judge"]}, "reward model 'nobody/judge' cannot be loaded: "),
    ],
)
def test_what_is_wrong_with_data_and_models_ends_with_code_2_and_the_message_alone(
    write, tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", *write(use_cpu=True, **changes)])
    assert exit_.value.code == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err


def test_an_error_of_training_keeps_its_traceback(write, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo_trl.trainer.GRPOTrainer", Recorder)
    monkeypatch.setattr(Recorder, "train", lambda self, **options: int("no number"), raising=False)
    with pytest.raises(ValueError, match="no number"):
        commands.train(write(train_datasets=[jsonl(tmp_path / "rows.jsonl", ROWS)]))


@pytest.mark.parametrize(("argv", "message"), [([], "required: command"), (["tune"], "invalid choice: 'tune'")])
def test_unknown_command(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_positional_recipe_and_missing_file(write, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"a recipe is given as --config recipe\.yaml"):
        parse_recipe(["recipe.yaml"])
    with pytest.raises(ValueError, match="--config needs the path"):
        parse_recipe(["--config"])
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(tmp_path / "none.yaml")])
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "train" in out
    assert ("--num_generations" in out) is (argv[0] == "train")


@pytest.mark.parametrize(("command", "option"), [("plan", "[--memory 24GiB]"), ("check", "[--model PATH]")])
def test_help_of_a_command_names_its_own_option(command, option, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"grpo-trl {command} --config YAML {option} [--field value ...]" in capsys.readouterr().out


# ---- data ----


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "type": "jsonl", "input": "question", "output": "answer"}


ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]


def test_named_evaluation_sets_are_read_only_when_evaluated(write, tmp_path):
    entry = jsonl(tmp_path / "rows.jsonl", ROWS)
    named = {"first": [entry | {"split": "train[:2]"}], "rest": [entry | {"split": "train[2:]"}]}
    argv = write(train_datasets=[entry], eval_datasets=named)
    train_dataset, eval_dataset = commands.load_data(*parse_recipe(argv)[:2])
    assert len(train_dataset) == 8 and eval_dataset is None
    _, eval_dataset = commands.load_data(*parse_recipe([*argv, "--eval_strategy", "epoch"])[:2])
    assert {name: len(rows) for name, rows in eval_dataset.items()} == {"first": 2, "rest": 6}
    argv = write(train_datasets=[entry], eval_datasets=named["first"], eval_strategy="epoch")
    assert len(commands.load_data(*parse_recipe(argv)[:2])[1]) == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_trls_dataset_name(write, tmp_path, streaming):
    rows = [{"prompt": row["question"], "answer": row["answer"]} for row in ROWS]
    for split in ("train", "test"):
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    argv = write(train_datasets=None, dataset_name=str(tmp_path / "data"), eval_strategy="epoch", max_steps=1)
    argv += ["--dataset_streaming", str(streaming)]
    train_dataset, eval_dataset = commands.load_data(*parse_recipe(argv)[:2])
    assert [row["prompt"] for row in train_dataset] == [row["question"] for row in ROWS]
    assert [row["answer"] for row in eval_dataset] == [row["answer"] for row in ROWS]
    assert isinstance(train_dataset, Dataset) is not streaming


def test_data_errors_come_before_the_model(write, tmp_path):
    entry = jsonl(tmp_path / "rows.jsonl", [*ROWS, {"question": None, "answer": "1"}])
    recipe = parse_recipe(write(train_datasets=[entry], model_name_or_path="no/such-model"))
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 9, column 'question'"):
        commands.make_trainer(*recipe)


# ---- what reaches the trainer ----


class Recorder:
    """Stands for GRPOTrainer: keeps how it was made and what was called."""

    def __init__(self, **options):
        self.options, self.calls = options, []
        Recorder.last = self

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))


@pytest.fixture
def recorded(write, tmp_path, monkeypatch):
    """Runs a recipe with a recording trainer, and returns that."""
    monkeypatch.setattr("grpo_trl.trainer.GRPOTrainer", Recorder)
    entry = jsonl(tmp_path / "rows.jsonl", ROWS)

    def run(**changes):
        commands.train(write(train_datasets=[entry], use_cpu=True, **changes))
        return Recorder.last

    return run


@pytest.mark.parametrize(("given", "expected"), [(None, None), (True, True), ("false", False), ("c-1", "c-1")])
def test_a_run_is_resumed_saved_and_ended(recorded, tmp_path, monkeypatch, given, expected):
    monkeypatch.chdir(tmp_path)
    if given in (True, "c-1"):
        with pytest.raises(SystemExit):  # before anything is loaded
            recorded(resume_from_checkpoint=given)
        (tmp_path / "c-1").mkdir()
        (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    trainer = recorded(resume_from_checkpoint=given)
    assert trainer.calls == [
        ("train", (), {"resume_from_checkpoint": expected}),
        ("save_model", (str(tmp_path / "out"),), {}),
        ("end", (), {}),
    ]


def test_a_refused_resume_ends_with_code_2_and_the_message_alone(recorded, monkeypatch, capsys):
    def refuses(self, **options):
        raise ResumeError("Cannot resume from here: because.")

    monkeypatch.setattr(Recorder, "train", refuses, raising=False)
    with pytest.raises(SystemExit) as end:
        recorded()
    assert end.value.code == 2 and capsys.readouterr().err.endswith("Cannot resume from here: because.\n")


def test_a_run_is_pushed_with_the_name_of_its_data(recorded, write, tmp_path, monkeypatch):
    Dataset.from_list([{"prompt": "a"}]).to_parquet(tmp_path / "data" / "train.parquet")
    monkeypatch.setattr("grpo_trl.trainer.GRPOTrainer", Recorder)
    commands.train(write(train_datasets=None, dataset_name=str(tmp_path / "data"), push_to_hub=True))
    assert ("push_to_hub", (), {"dataset_name": str(tmp_path / "data")}) in Recorder.last.calls
    assert recorded(push_to_hub=True).calls[2] == ("push_to_hub", (), {"dataset_name": None})
    assert "push_to_hub" not in [name for name, *_ in recorded().calls]


def test_how_the_policy_is_loaded(recorded):
    options = recorded().options
    assert options["model"] == "some/model" and options["reward_funcs"] == ["accuracy"]
    assert options["peft_config"] is None and options["quantization_config"] is None
    assert options["args"].model_init_kwargs == {"revision": "main", "attn_implementation": None, "dtype": "float32"}
    options = recorded(model_revision="v2", attn_implementation="eager", dtype="bfloat16").options
    assert options["args"].model_init_kwargs == {"revision": "v2", "attn_implementation": "eager", "dtype": "bfloat16"}
    options = recorded(model_revision="v2", model_init_kwargs={"revision": "v3", "use_cache": True}).options
    assert options["args"].model_init_kwargs["revision"] == "v3" and options["args"].model_init_kwargs["use_cache"]


def test_adapter_and_quantisation(recorded):
    adapter = recorded(use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"]).options["peft_config"]
    assert adapter.r == 4 and adapter.target_modules == {"q_proj", "v_proj"}
    quantised = recorded(load_in_4bit=True, bnb_4bit_quant_type="fp4").options["quantization_config"]
    assert quantised.load_in_4bit and quantised.bnb_4bit_quant_type == "fp4"


def test_the_recipe_reaches_cards_and_epoch_folders(recorded):
    recipe = recorded(reward_funcs=["think_format"], dtype="bfloat16").recipe
    assert recipe["model_name_or_path"] == "some/model" and recipe["dtype"] == "bfloat16"
    assert recipe["reward_funcs"] == ["think_format"] and recipe["train_datasets"][0]["input"] == "question"


# ---- the whole way ----


def test_script_trains_from_a_recipe_and_its_resolved_recipe_repeats_it(write, tmp_path, model_dir, reward_model_dir):
    (tmp_path / "own_rewards.py").write_text(
        "def brevity(completions, answer, **kwargs):\n    return [-len(text) / 100 for text in completions]\n"
    )
    argv = write(
        model_name_or_path=model_dir,
        train_datasets=[jsonl(tmp_path / "train.jsonl", ROWS)],
        reward_model_name_or_path=reward_model_dir,
        reward_funcs=["exact_match", "own_rewards.brevity"],
        reward_weights=[1.0, 0.5, 0.25],
        per_device_train_batch_size=8,
        max_completion_length=8,
        num_train_epochs=1,
        num_iterations=2,
        save_steps=4,
        logging_steps=1,
        gradient_checkpointing=False,
        use_cpu=True,
        model_init_kwargs={"use_cache": True},
        **ENV,
    )
    out = tmp_path / "out"
    run_script(argv, cwd=tmp_path)
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8  # 8 prompts, 2 at a time, 2 passes
    reward_names = {name.split("/")[1] for log in state["log_history"] for name in log if name.startswith("rewards/")}
    assert reward_names >= {"exact_match", "brevity", Path(reward_model_dir).name}
    assert (out / "training_metrics.png").stat().st_size > 0
    assert (out / "epoch_1" / "train_script.py").read_text() == (ROOT / "recipes" / "grpo.py").read_text()
    start, final = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model_dir, out))
    assert any(not start[name].equal(final[name]) for name in start)

    resolved = str(out / "epoch_1" / "recipe.yaml")
    script_args, args, model_args = parse_recipe(["--config", resolved, "--dtype", "bfloat16"])
    first = parse_recipe(argv)
    assert replace(script_args) == replace(first[0])  # but for `env`
    assert args.objective == first[1].objective and args.num_iterations == 2
    assert model_args.model_name_or_path == model_dir
    text = Path(resolved).read_text()
    assert "env, to be set again (values are not written): GRPO_TRL_API_KEY, GRPO_TRL_TEST" in text
    assert "secret" not in text
    # a later --dtype is not shadowed by the resolved arguments of from_pretrained
    assert args.model_init_kwargs == {"use_cache": True}


ENV = {"env": {"GRPO_TRL_TEST": "1", "GRPO_TRL_API_KEY": "secret"}}


def test_a_plan_finds_rewards_in_the_current_folder(tmp_path, write, model_dir, monkeypatch, capsys):
    (tmp_path / "rewards_beside_the_recipe.py").write_text("def shorter(completions, **kwargs):\n    return [0.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    argv = write(reward_funcs=["rewards_beside_the_recipe.shorter"], model_name_or_path=model_dir)
    cli.main(["plan", *argv, "--memory", "1GiB"])
    assert "yes" in capsys.readouterr().out


def run_script(argv, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "grpo.py"), *argv]
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-4000:]


# ---- the documentation ----


@pytest.fixture(scope="module")
def document():
    return (ROOT / "docs" / "configuration.md").read_text()


def own_fields():
    training = {f.name for f in fields(GRPOConfig.__mro__[1])}
    return [f for f in fields(GRPOConfig) if f.name not in training or f.name in GRPOConfig.__annotations__]


def test_documented_defaults_are_the_defaults(document):
    rows = {
        cells[0].strip("` "): cells[1].removesuffix("(variant) ").strip("` ")
        for line in document.split("## What differs")[0].splitlines()
        if line.startswith("| `") and (cells := line.strip("| ").split("|"))
    }
    assert rows
    variant = VARIANTS["grpo"]
    for field in own_fields():
        default = getattr(variant, field.name) if field.name in GOVERNED else field.default
        assert rows.get(field.name) == yaml_text(default), field.name
    defaults = ScriptArguments()
    for field in fields(ScriptArguments):
        if field.init:
            assert rows.get(field.name) == yaml_text(getattr(defaults, field.name)), field.name


def yaml_text(value):
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_model_fields_are_documented(document):
    assert [f.name for f in fields(ModelConfig) if f"`{f.name}`" not in document] == []


def test_refused_options_and_remedies_are_documented(document):
    plain = document.replace("\\|", "|")
    for name, (_, remedy) in REFUSED.items():
        assert any(f"`{name}`" in line and remedy in line for line in plain.splitlines()), name
    for name in REFUSED_SCRIPT_OPTIONS:
        assert f"`{name}`" in document


def test_fields_without_effect_are_documented(document):
    section = document.split("## Fields of transformers without effect")[1]
    refused, warned = section.split("one warning names it")
    for name, (_, is_refused, why) in UNUSED.items():
        part = refused if is_refused else warned
        assert any(f"`{name}`" in line and why in line for line in part.splitlines()), name


def test_names_of_trls_rewards_are_documented():
    text = (ROOT / "docs" / "rewards.md").read_text()
    for name, own in TRL_NAMES.items():
        assert f"| `{name}` | `{own}` |" in text
    for name in REWARDS:
        assert f"\n| `{name}` | " in text


def test_every_default_that_differs_from_trl_is_in_the_table(document):
    table = document.split("## What differs from TRL")[1].split("## TRL options")[0]
    theirs = {f.name: f.default for f in fields(trl.GRPOConfig)}
    differing = [f.name for f in own_fields() if f.name in theirs and f.default != theirs[f.name]]
    assert "num_generations" in differing
    assert [name for name in differing if f"`{name}`" not in table] == []


def test_the_script_without_arguments_repeats_the_run_beside_which_it_lies(tmp_path, monkeypatch):
    script, recipe, started = tmp_path / "train_script.py", tmp_path / "recipe.yaml", []
    script.write_text((ROOT / "recipes" / "grpo.py").read_text())
    monkeypatch.setattr(commands, "train", started.append)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")  # says what is missing, as the command does
    recipe.touch()
    runpy.run_path(str(script), run_name="__main__")
    monkeypatch.setattr(sys, "argv", [str(script), "--config", "another.yaml"])
    runpy.run_path(str(script), run_name="__main__")
    assert started == [[], ["--config", str(recipe)], ["--config", "another.yaml"]]
