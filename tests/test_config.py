import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import trl
from transformers import TrainingArguments

import grpo_trl
from grpo_trl import VARIANTS, GRPOConfig, GRPOTrainer
from grpo_trl.config import FIELD_NAMES, GOVERNED
from grpo_trl.refused import REFUSED

TRL_FIELDS = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}
OWN_FIELDS = FIELD_NAMES - {field.name for field in dataclasses.fields(TrainingArguments)}


def default_of(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@pytest.fixture
def config(tmp_path):
    def make(**options):
        return GRPOConfig(str(tmp_path), **({"use_cpu": True, "bf16": False, "report_to": "none"} | options))

    return make


# ---- TRL's names ----


def test_every_trl_option_is_ours_or_refused():
    assert {name for name in TRL_FIELDS if name not in FIELD_NAMES and name not in REFUSED} == set()
    assert {name for name in REFUSED if name not in TRL_FIELDS} == set()  # nothing that TRL does not have either
    assert FIELD_NAMES & set(REFUSED) == set()


def test_refused_options_name_a_remedy():
    assert all(len(remedy) > 10 for _, remedy in REFUSED.values())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_options(config, name):
    assert not hasattr(config(**{name: default_of(TRL_FIELDS[name])}), name)  # what TRL does anyway changes nothing
    with pytest.raises(ValueError) as error:
        config(**{name: "something else"})
    assert f"{name}='something else' is a TRL option that is not available here; {REFUSED[name][1]}." in str(
        error.value
    )


def test_an_unknown_option_is_a_type_error(config):
    with pytest.raises(TypeError, match="num_generation"):
        config(num_generation=4)


# Defaults that are not TRL's: the seed document's, and None where the row of a variant decides.
OTHER_DEFAULTS = {
    "num_generations": 4,
    "num_iterations": 4,
    "disable_dropout": True,
    **dict.fromkeys(
        (
            "beta",
            "epsilon",
            "importance_sampling_level",
            "scale_rewards",
            "loss_type",
            "mask_truncated_completions",
            "use_bias_correction_kl",
        )
    ),
}


def test_defaults_are_trls_but_for_a_few():
    ours = {field.name: default_of(field) for field in dataclasses.fields(GRPOConfig)}
    differing = {
        name: ours[name] for name, field in TRL_FIELDS.items() if name in ours and ours[name] != default_of(field)
    }
    assert differing == OTHER_DEFAULTS


def test_trainer_has_trls_constructor():
    def parameters(trainer):
        return [name for name in inspect.signature(trainer.__init__).parameters if name != "self"]

    theirs = parameters(trl.GRPOTrainer)
    assert parameters(GRPOTrainer)[: len(theirs)] == theirs


def test_every_field_has_help_and_is_read_somewhere():
    package = Path(grpo_trl.__file__).parent
    source = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name != "config.py")
    assert {name for name in OWN_FIELDS if not re.search(rf"\b{name}\b", source)} <= {
        # resolved into other fields in config.py
        "loss_type",
        "use_bias_correction_kl",
    }
    for field in dataclasses.fields(GRPOConfig):
        assert field.name not in OWN_FIELDS or len(field.metadata["help"]) > 10


# ---- The seed's defaults ----


def test_defaults_are_the_seeds(config):
    args = config()
    assert args.learning_rate == 1e-6
    assert args.num_generations == 4
    assert args.num_iterations == 4
    assert args.objective == {
        "variant": "grpo",
        "paper": VARIANTS["grpo"].paper,
        "surrogate": "clip",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": 0.2,
        "delta": None,
        "scale_rewards": "batch_relative",
        "token_weighting": "token",
        "beta": 0.01,
        "kl_estimator": "k3_ratio",
        "mask_truncated_completions": False,
    }
    # BATCH_SIZE 2 (prompts) is 8 completions, transformers' default
    assert args.per_device_train_batch_size == args.generation_batch_size == 8
    assert args.remove_unused_columns is False
    assert not args.on_policy


def test_bf16_is_off_where_it_was_not_asked_for(config):
    assert config(bf16=None, fp16=True).bf16 is False
    assert config(bf16=True).bf16 is True


# ---- Which objective ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"token_weighting": "token", "scale_rewards": "batch_relative", "beta": 0.01}),
        ({"variant": "deepseekmath"}, {"token_weighting": "sequence", "beta": 0.04, "kl_estimator": "k3"}),
        # loss_type wins over the row ...
        ({"loss_type": "grpo"}, {"token_weighting": "sequence", "scale_rewards": "batch_relative"}),
        ({"variant": "deepseekmath", "loss_type": "dapo"}, {"token_weighting": "token", "beta": 0.04}),
        ({"loss_type": "dr_grpo"}, {"token_weighting": "max_length"}),
        # ... and loses to the explicit field
        ({"loss_type": "dr_grpo", "token_weighting": "token"}, {"token_weighting": "token"}),
        (
            {"variant": "deepseekmath", "token_weighting": "token", "beta": 0.5},
            {"token_weighting": "token", "beta": 0.5},
        ),
        # falsy values are explicit too
        ({"variant": "deepseekmath", "beta": 0.0, "epsilon": 0.0}, {"beta": 0.0, "epsilon": 0.0}),
        ({"mask_truncated_completions": True}, {"mask_truncated_completions": True}),
        # the clip range is symmetric unless it is said not to be
        ({"epsilon": 0.1}, {"epsilon": 0.1, "epsilon_high": 0.1}),
        ({"epsilon_high": 0.28}, {"epsilon": 0.2, "epsilon_high": 0.28}),
        # TRL's booleans
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"use_bias_correction_kl": True, "variant": "deepseekmath"}, {"kl_estimator": "k3_ratio"}),
        ({"use_bias_correction_kl": False}, {"kl_estimator": "k3"}),
        ({"use_bias_correction_kl": False, "kl_estimator": "k2"}, {"kl_estimator": "k2"}),
    ],
)
def test_explicit_field_then_loss_type_then_row(config, options, expected):
    args = config(**options)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_resolves(config, variant):
    objective = config(variant=variant).objective
    row = dataclasses.asdict(VARIANTS[variant])
    assert objective.keys() == {"variant", "paper", *GOVERNED}
    assert {name: value for name, value in row.items() if value is not None}.items() <= objective.items()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "deepseekmath", "epsilon": 0.3, "beta": 0.0},
        {"loss_type": "dr_grpo", "scale_rewards": False, "use_bias_correction_kl": False},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "generation_batch_size": 16},
        {"generation_kwargs": '{"min_new_tokens": 2}', "model_init_kwargs": {"dtype": "bfloat16"}},
    ],
)
@pytest.mark.parametrize("form", ["dict", "json"])
def test_saved_config_reloads_to_the_same(config, options, form):
    args = config(**options)
    saved = args.to_dict() if form == "dict" else json.loads(args.to_json_string())
    again = GRPOConfig(**saved)
    assert again.objective == args.objective
    secrets = {name for name in saved if name.endswith("_token")}  # transformers writes none of them
    assert {name: getattr(again, name) for name in OWN_FIELDS - secrets} == {
        name: getattr(args, name) for name in OWN_FIELDS - secrets
    }
    assert again.per_device_train_batch_size == args.per_device_train_batch_size


def test_json_on_the_command_line_is_parsed(config):
    for name in ("model_init_kwargs", "reward_model_init_kwargs", "generation_kwargs", "chat_template_kwargs"):
        assert getattr(config(**{name: '{"min_new_tokens": 1}'}), name) == {"min_new_tokens": 1}


# ---- Batches ----


@pytest.mark.parametrize(
    ("options", "steps", "completions"),
    [
        ({}, 1, 8),
        ({"gradient_accumulation_steps": 4}, 4, 32),
        ({"steps_per_generation": 3}, 3, 24),
        ({"generation_batch_size": 32}, 4, 32),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, 2, 16),
        # a group may span micro-batches
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 4, 4),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 6, "num_generations": 6}, 6, 12),
    ],
)
def test_rollout_size(config, options, steps, completions):
    args = config(**options)
    assert (args.steps_per_generation, args.generation_batch_size) == (steps, completions)


@pytest.mark.parametrize(
    ("options", "on_policy"),
    [
        ({"num_iterations": 1}, True),
        ({"num_iterations": 1, "gradient_accumulation_steps": 2}, True),
        ({"num_iterations": 1, "steps_per_generation": 2}, False),
        ({"num_iterations": 2}, False),
    ],
)
def test_on_policy(config, options, on_policy):
    assert config(**options).on_policy is on_policy


# ---- Refusals: each says what was got, what was expected and what to do ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ppo"}, "variant='ppo' is unknown; use one of grpo, "),
        ({"loss_type": "ipo"}, "loss_type='ipo' is not available; use one of grpo, dapo, dr_grpo"),
        ({"surrogate": "square"}, "surrogate='square' is unknown; use one of clip"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown; use one of k1, k2, k3, k3_ratio"),
        ({"scale_rewards": "max"}, "scale_rewards='max' is unknown; use one of "),
        ({"token_weighting": "batch"}, "token_weighting='batch' is unknown; use one of "),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word' is unknown; use one of token, "),
        ({"num_generations": 1}, "num_generations=1 but a group needs at least 2"),
        ({"num_generations": None}, "num_generations=None but a group needs at least 2"),
        ({"num_generations": 3}, "num_generations=3 must divide the 8 completions .* use one of \\[2, 4, 8\\]"),
        (
            {"per_device_train_batch_size": 1},
            "num_generations=4 must divide the 1 .* ranks; raise per_device_train_batch_size",
        ),
        ({"generation_batch_size": 12}, "generation_batch_size=12 must be a multiple of .* 8 x 1; use 16"),
        (
            {"generation_batch_size": 16, "steps_per_generation": 4},
            "generation_batch_size=16 and steps_per_generation=4 contradict .* 32 completions",
        ),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "steps_per_generation=3 must be a multiple of gradient_accumulation_steps=2, .* use 4",
        ),
        ({"num_iterations": 0}, "num_iterations=0 is out of range: expected at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 is out of range: .* eval_temperature=0"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range"),
        ({"top_p": 1.1}, "top_p=1.1 is out of range"),
        ({"top_k": -1}, "top_k=-1 is out of range"),
        ({"min_p": 2.0}, "min_p=2.0 is out of range"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range"),
        ({"max_completion_length": 0}, "max_completion_length=0 is out of range"),
        ({"max_completion_length": None}, "max_completion_length=None is out of range"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 is out of range"),
        ({"beta": -0.1}, "beta=-0.1 is out of range"),
        ({"epsilon": 1.5}, "epsilon=1.5 is out of range"),
        ({"eval_temperature": -1.0}, "eval_temperature=-1.0 is out of range"),
        ({"num_generations_eval": -1}, "num_generations_eval=-1 is out of range"),
        ({"reward_timeout": 0.0}, "reward_timeout=0.0 is out of range"),
        ({"reward_batch_size": 0}, "reward_batch_size=0 is out of range"),
        ({"prompt_format": "html"}, "prompt_format='html' is unknown; use one of auto, chat, text"),
        ({"overlong_prompts": "cut"}, "overlong_prompts='cut' is unknown; use one of drop, truncate, error"),
        ({"reward_call": "row"}, "reward_call='row' is unknown; use one of batch, group"),
        ({"reward_input_format": "xml"}, "reward_input_format='xml' is unknown; use one of auto, pair, chat, text"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size would break up groups .* set it to False"),
        (
            {"sync_ref_model": True, "beta": 0.0},
            "sync_ref_model and ref_model_name_or_path need the reference, but beta=0",
        ),
    ],
)
def test_refusals(config, options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**options)
    assert str(error.value).startswith("GRPO cannot start:\n- ")
    assert str(error.value).count("\n- ") == 1  # and nothing else is blamed


@pytest.mark.parametrize("options", [{"top_p": 1.0, "min_p": 0.0, "eval_temperature": 0.0}, {"max_prompt_length": 1}])
def test_edges_that_are_allowed(config, options):
    args = config(**options)
    assert {name: getattr(args, name) for name in options} == options


def test_all_problems_are_in_one_error(config):
    with pytest.raises(ValueError) as error:
        config(num_generations=3, temperature=0.0, kl_estimator="k9", reward_call="row", sync_ref_model=True, beta=0.0)
    problems = str(error.value).split("\n- ")[1:]
    assert [re.split("[= ]", problem)[0] for problem in problems] == [
        "kl_estimator",
        "num_generations",
        "temperature",
        "reward_call",
        "sync_ref_model",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, accelerate joins the processes")
def test_a_rank_that_was_started_alone_is_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"launcher started 2 processes.* use_cpu: true"):
        config(use_cpu=False)


# ---- Evaluation ----


def test_best_model_is_that_of_the_highest_reward(config):
    every_step = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    args = config(load_best_model_at_end=True, **every_step)
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)
    chosen = {"metric_for_best_model": "eval_kl", "greater_is_better": False}
    args = config(load_best_model_at_end=True, **every_step, **chosen)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_kl", False)
