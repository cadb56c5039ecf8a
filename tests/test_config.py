import dataclasses
import inspect
import json
import pickle
import re

import pytest
import torch
import trl
from transformers import TrainingArguments

from grpo_trl import VARIANTS, GRPOConfig, GRPOTrainer, config_checks
from grpo_trl.config import GOVERNED
from grpo_trl.refused import REFUSED, UNUSED
from tests.fields import FIELD_NAMES, reads_of_this_package, reads_of_transformers

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


# ---- vLLM ----


@pytest.mark.parametrize("options", [{"use_vllm": True}, {"rollout_engine": "vllm"}])
def test_vllm_is_asked_for_by_either_name_and_corrected_for(config, options):
    args = config(**options)
    assert (args.use_vllm, args.rollout_engine) == (True, "vllm")
    correction = args.sampler_correction, args.sampler_correction_min, args.sampler_correction_max
    assert correction == ("sequence_mask", None, 3.0)  # TRL's defaults
    again = config(**{name: getattr(args, name) for name in ("use_vllm", "rollout_engine", "sampler_correction")})
    assert again.sampler_correction == "sequence_mask"


def test_correction_for_vllm_by_trls_names(config):
    args = config(
        use_vllm=True, vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0,
        vllm_importance_sampling_clip_min=0.5,
    )  # fmt: skip
    correction = args.sampler_correction, args.sampler_correction_min, args.sampler_correction_max
    assert correction == ("token_truncate", 0.5, 2.0)
    assert config(use_vllm=True, vllm_importance_sampling_clip_max=None).sampler_correction_max is None
    assert config(use_vllm=True, vllm_importance_sampling_correction=False).sampler_correction is None
    assert config(use_vllm=True, sampler_correction="token_mask").sampler_correction == "token_mask"
    assert config().sampler_correction is None  # our own engines need none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "rollout_engine": "native"}, "use_vllm=True and rollout_engine='native' contradict"),
        ({"vllm_mode": "elsewhere"}, "vllm_mode='elsewhere'"),
        ({"vllm_server_port": 0}, r"vllm_server_port=0 is out of range: expected in \[1, 65535\]"),
        ({"vllm_group_port": 65536}, r"vllm_group_port=65536 is out of range: expected in \[1, 65535\]"),
        ({"vllm_gpu_memory_utilization": 0.0}, r"vllm_gpu_memory_utilization=0.0 is out of range"),
        ({"vllm_importance_sampling_mode": "tis"}, "sampler_correction='tis'"),
        (
            {"loss_type": "vespo"},
            "sampler_correction='sequence_mask' gives each token that of its sequence",
        ),
        ({"sampler_correction_max": 2.0}, "sampler_correction_max=2.0 acts with sampler_correction, which is not set"),
        ({"sampler_correction_min": 0.5}, "or use vllm_importance_sampling_clip_min"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "sampler_correction_min=4.0 is above sampler_correction_max=3.0"),
        (
            {"vllm_structured_outputs_regex": "a", "generation_kwargs": {"structured_outputs": {"regex": "b"}}},
            "generation_kwargs structured_outputs=.* and vllm_structured_outputs_regex='a' say different things",
        ),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "sampler_correction='token_truncate' truncates weights to bounds, and there is none",
        ),
        ({"cache_implementation": "static"}, "vLLM has its own cache"),
        ({"generation_kwargs": {"n": 2}}, "generation_kwargs n is set by the trainer where vLLM samples; use num_gen"),
        (
            {"generation_kwargs": {"seed": 2}},
            "generation_kwargs seed is set by the trainer where vLLM samples; use seed",
        ),
    ],
)
def test_options_of_vllm_that_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**{"use_vllm": True} | options)


def test_generation_kwargs_of_vllm(config):
    args = config(
        use_vllm=True, generation_kwargs={"presence_penalty": 0.1, "top_k": 5}, vllm_structured_outputs_regex="[0-9]+"
    )
    assert args.top_k == 5
    assert args.generation_kwargs == {"presence_penalty": 0.1, "structured_outputs": {"regex": "[0-9]+"}}
    config(use_vllm=True, generation_kwargs=args.generation_kwargs, vllm_structured_outputs_regex="[0-9]+")  # agrees


def test_an_unknown_option_is_a_type_error(config):
    with pytest.raises(TypeError, match="num_generation"):
        config(num_generation=4)


# Defaults that are not TRL's: this project's own, and None where the row of a variant decides.
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
            "entropy_coef",
            "multi_objective_aggregation",
            "sapo_temperature_neg",
            "sapo_temperature_pos",
            "top_entropy_quantile",
            "vespo_k_neg",
            "vespo_k_pos",
            "vespo_lambda_neg",
            "vespo_lambda_pos",
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
    """Those of transformers that are declared anew count too: here, or where transformers runs, they must be read."""
    declared = OWN_FIELDS | set(GRPOConfig.__annotations__)
    assert "remove_unused_columns" in declared
    read = reads_of_this_package() | reads_of_transformers()
    assert {name for name in declared if name not in read} <= {
        # resolved into other fields in config.py
        "loss_type",
        "use_bias_correction_kl",
    }
    for field in dataclasses.fields(GRPOConfig):
        assert field.name not in declared or len(field.metadata["help"]) > 10


# ---- What transformers has and nothing here reads ----

TRANSFORMERS_FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


def test_every_field_of_transformers_has_an_effect_or_is_said_to_have_none():
    read = reads_of_this_package() | reads_of_transformers()
    assert {name for name in TRANSFORMERS_FIELDS if name not in read and name not in UNUSED} == set()
    assert {name for name in UNUSED if name not in TRANSFORMERS_FIELDS} == set()
    assert all(len(why) > 10 for _, _, why in UNUSED.values())


@pytest.mark.parametrize("name", sorted(UNUSED))
def test_a_field_without_effect_is_refused_or_warned_about(config, name, caplog):
    harmless, refused, why = UNUSED[name]
    assert default_of(TRANSFORMERS_FIELDS[name]) in harmless
    for value in harmless:
        config(**{name: value})
    assert "Without effect" not in caplog.text
    other = 3 if name not in ("train_sampling_strategy", "length_column_name") else "sequential"
    if refused:
        with pytest.raises(ValueError, match=re.escape(f"{name}={other!r} is not available here; {why}.")):
            config(**{name: other})
    elif {True, False} != set(harmless):
        # transformers wants workers for a prefetch factor
        config(**({"dataloader_num_workers": 1} if name == "dataloader_prefetch_factor" else {}), **{name: other})
        assert len(caplog.messages) == 1 and f"{name}={other!r} ({why})" in caplog.text


def test_one_warning_names_all(config, caplog):
    config(dataloader_num_workers=2, do_eval=True)
    assert len(caplog.messages) == 1
    assert "dataloader_num_workers=2 (prompts are read" in caplog.text and "do_eval=True (eval_strategy" in caplog.text


def test_other_ranks_do_not_warn(config, caplog, monkeypatch):
    monkeypatch.setattr(GRPOConfig, "process_index", 1)
    config(dataloader_num_workers=2)
    assert not caplog.messages


def test_the_token_is_not_pickled(config):
    args = config(hub_token="hf_token_of_mine")
    assert args.hub_token == "hf_token_of_mine"
    assert b"hf_token_of_mine" not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)).learning_rate == args.learning_rate


# ---- Defaults ----


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
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "multi_objective_aggregation": "sum_then_normalize",
        "advantage_baseline": "group_mean",
        "scale_rewards": "batch_relative",
        "token_weighting": "token",
        "beta": 0.01,
        "kl_estimator": "k3_ratio",
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "mask_truncated_completions": False,
        "overlong_penalty": False,
        "dynamic_sampling": False,
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
        ({"loss_type": "cispo"}, {"surrogate": "cispo", "epsilon_high": 5.0}),
        # what bounds the ratio itself in one surrogate is no clip range in another
        ({"variant": "cispo", "loss_type": "dapo"}, {"surrogate": "clip", "epsilon_high": 0.2}),
        ({"variant": "cispo", "surrogate": "clip", "epsilon": 0.1}, {"surrogate": "clip", "epsilon_high": 0.1}),
        ({"variant": "cispo", "loss_type": "dapo", "epsilon_high": 0.3}, {"epsilon_high": 0.3}),
        ({"loss_type": "cispo", "surrogate": "clip"}, {"surrogate": "clip", "epsilon_high": 0.2}),
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


DICT_FIELDS = (
    "model_init_kwargs",
    "ref_model_init_kwargs",
    "reward_model_init_kwargs",
    "generation_kwargs",
    "chat_template_kwargs",
)
CHECKPOINTING = sorted(  # two names of one field since transformers 5.23
    {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"} & FIELD_NAMES
)


def test_json_on_the_command_line_is_parsed(config):
    for name in DICT_FIELDS:
        assert getattr(config(**{name: '{"min_new_tokens": 1}'}), name) == {"min_new_tokens": 1}


@pytest.mark.parametrize("value", ['{"a": ', "[1]", "fast", [1], 7])
@pytest.mark.parametrize("name", [*DICT_FIELDS, "lr_scheduler_kwargs", *CHECKPOINTING])
def test_a_mapping_that_is_none_names_its_field(config, name, value):
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} must be a mapping.* '{{...}}'"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["ref_device", "reward_device", "accelerator_config", "fsdp_config", "deepspeed"])
def test_broken_json_where_a_word_may_stand_names_its_field(config, name):
    with pytest.raises(ValueError, match=rf"{name}='{{\"a\": ' must be a mapping.*Expecting value"):
        config(**{name: '{"a": '})


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


def test_what_follows_from_the_size_of_a_rollout(config):
    args = config(gradient_accumulation_steps=2, steps_per_generation=6, num_iterations=5)
    assert args.completions_per_rank == 48
    assert args.optimizer_steps_per_rollout == args.dynamic_sampling_max_age == 15


@pytest.fixture
def two_ranks(monkeypatch):
    """The time-outs that a rank out of two sets, in seconds."""
    timeouts = []
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    monkeypatch.setattr("grpo_trl.config._set_pg_timeout", lambda timeout: timeouts.append(timeout.total_seconds()))
    return timeouts


@pytest.mark.parametrize("options", [{"generation_batch_size": 32}, {"steps_per_generation": 2}])
def test_the_rollout_of_two_ranks(config, two_ranks, options):
    args = config(**options)
    assert (args.steps_per_generation, args.generation_batch_size, args.completions_per_rank) == (2, 32, 16)
    with pytest.raises(ValueError, match="must be a multiple of per_device_train_batch_size x ranks = 8 x 2; use 32"):
        config(generation_batch_size=24)


def test_ranks_on_the_cpu_wait_for_each_other_as_long_as_they_are_told(config, two_ranks):
    config(ddp_timeout=99)
    assert two_ranks == [99]


def test_a_second_gpu_that_is_seen_is_not_used(config, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert config().n_gpu == 1 and config().train_batch_size == 8


# ---- Refusals: each says what was got, what was expected and what to do ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ppo"}, "variant='ppo' is unknown; use one of grpo, "),
        ({"loss_type": "ipo"}, "loss_type='ipo' is not available; use one of grpo, dapo, bnpo, dr_grpo"),
        ({"surrogate": "square"}, "surrogate='square' is unknown; use one of clip"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' is unknown; use one of k1, k2, k3, k3_ratio"),
        ({"scale_rewards": "max"}, "scale_rewards='max' is unknown; use one of "),
        ({"token_weighting": "batch"}, "token_weighting='batch' is unknown; use one of "),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word' is unknown; use one of token, "),
        ({"num_generations": 1}, "num_generations=1 is out of range: expected at least 2, because a group compares"),
        ({"num_generations": None}, "num_generations=None is out of range: expected at least 2"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 is out of range: expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is out of range: expected at least 1"),
        ({"steps_per_generation": 0}, "steps_per_generation=0 is out of range: expected at least 1"),
        ({"generation_batch_size": 0}, "generation_batch_size=0 is out of range: expected at least 1"),
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
        ({"vespo_k_pos": -5.0}, "vespo_k_pos=-5.0 is out of range: expected at least 0"),
        ({"vespo_lambda_neg": 0.0}, "vespo_lambda_neg=0.0 is out of range: expected more than 0"),
        (
            {"ref_model_init_kwargs": {"device_map": "auto"}},
            "ref_model_init_kwargs has a device_map; set ref_device instead",
        ),
        (
            {"reward_model_init_kwargs": {"device_map": "auto"}},
            "reward_model_init_kwargs has a device_map; set reward_device instead",
        ),
        ({"skip_solved_after": 0}, "skip_solved_after=0 is out of range: expected at least 1 draw"),
        ({"skip_hopeless_after": -1}, "skip_hopeless_after=-1 is out of range: expected at least 1 draw"),
        ({"beta": -0.1}, "beta=-0.1 is out of range"),
        ({"epsilon": -0.1, "epsilon_high": 0.2}, "epsilon=-0.1 is out of range"),
        ({"adam_beta1": 1.0}, r"adam_beta1=1.0 is out of range: expected in \[0, 1\)"),
        ({"eval_temperature": -1.0}, "eval_temperature=-1.0 is out of range"),
        ({"epsilon_high": -0.1}, "epsilon_high=-0.1 is out of range"),
        ({"num_generations_eval": -1}, "num_generations_eval=-1 is out of range"),
        ({"num_generations_eval": 0}, "num_generations_eval=0 is out of range"),
        ({"eval_max_completion_length": 0}, "eval_max_completion_length=0 is out of range"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0 is out of range"),
        ({"reward_max_length": 0}, "reward_max_length=0 is out of range"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps=0 is out of range"),
        ({"ref_model_mixup_alpha": 1.1}, r"ref_model_mixup_alpha=1.1 is out of range: expected in \[0, 1\]"),
        ({"ref_model_mixup_alpha": -0.1}, "ref_model_mixup_alpha=-0.1 is out of range"),
        ({"num_completions_to_print": -1}, "num_completions_to_print=-1 is out of range"),
        ({"delta": 0.0}, r"delta=0.0 must be more than 1 \+ epsilon_high = 1.2"),
        ({"delta": 1.28, "epsilon_high": 0.28}, r"delta=1.28 must be more than 1 \+ epsilon_high = 1.28"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss': .*no eval_loss; use eval_reward"),
        ({"metric_for_best_model": "eval_loss"}, "metric_for_best_model='eval_loss': .*no eval_loss; use eval_reward"),
        ({"reward_timeout": 0.0}, "reward_timeout=0.0 is out of range"),
        ({"reward_batch_size": 0}, "reward_batch_size=0 is out of range"),
        ({"prompt_format": "html"}, "prompt_format='html' is unknown; use one of auto, chat, text"),
        ({"cache_implementation": "fast"}, "cache_implementation='fast' is unknown; use one of static, "),
        (
            {"cache_implementation": "offloaded_static"},
            "brings keys and values from the CPU to a GPU",
        ),
        ({"cache_implementation": "quantized"}, "'quantized' needs optimum-quanto or hqq, and neither is installed"),
        (
            {"off_policy_mask_threshold": 0.0},
            "off_policy_mask_threshold=0.0 is out of range: expected more",
        ),
        ({"overlong_prompts": "cut"}, "overlong_prompts='cut' is unknown; use one of drop, truncate, error"),
        ({"reward_call": "row"}, "reward_call='row' is unknown; use one of batch, group"),
        ({"reward_input_format": "xml"}, "reward_input_format='xml' is unknown; use one of auto, pair, chat, text"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not available here; set it to False"),
        (
            {"sync_ref_model": True, "beta": 0.0},
            "sync_ref_model and ref_model_name_or_path need the reference, but beta=0",
        ),
        (
            {"ref_model_name_or_path": "elsewhere", "beta": 0.0},
            "sync_ref_model and ref_model_name_or_path need the reference, but beta=0",
        ),
        ({"cuda_graphs": True}, "cuda_graphs=True needs a CUDA device, and this run is on cpu"),
        ({"loss_type": "cispo", "epsilon_high": 0.9}, "bounds the ratio itself by epsilon_high, and 0.9 would shrink"),
        (
            {"top_entropy_quantile": 0.2, "max_tokens_per_microbatch": 99},
            "top_entropy_quantile picks tokens from a whole micro-batch",
        ),
        (
            {"variant": "gdpo", "dynamic_sampling": True, "dynamic_sampling_tolerance": 0.1},
            "normalize_then_sum brings to the same spread first; set it to 0, or use dynamic_sampling_filter",
        ),
        (
            {"loss_type": "vespo", "sampler_correction": "sequence_truncate"},
            "sampler_correction='sequence_truncate' gives each token that of its sequence",
        ),
    ],
)
def test_refusals(config, options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**options)
    assert str(error.value).startswith("GRPO cannot start:\n- ")
    assert str(error.value).count("\n- ") == 1  # and nothing else is blamed


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0, "min_p": 0.0, "eval_temperature": 0.0},
        {"max_prompt_length": 1, "reward_max_length": None, "num_generations_eval": 1, "num_completions_to_print": 0},
        {"delta": 1.21, "ref_model_mixup_alpha": 0.0, "ref_model_sync_steps": 1},
        {"surrogate": "cispo", "epsilon_high": 1.0, "cuda_graphs": False},
        {"sampler_correction": "token_truncate", "sampler_correction_min": 1.0, "sampler_correction_max": 1.0},
        {"sampler_correction": "token_truncate", "sampler_correction_min": 1.0, "sampler_correction_max": None},
        {"sampler_correction": "sequence_mask", "sampler_correction_max": None},
    ],
)
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


ON_CPU = {"ref_device": "cpu"}
OWN_LOSS = {"liger_kernel_config": {"fused_linear_cross_entropy": True}}


@pytest.mark.parametrize(
    ("installed", "options", "message"),
    [
        (False, {}, "use_liger_kernel=True needs the package liger-kernel"),
        (True, {}, "use_liger_kernel=True puts Triton kernels into the layers, and this run is on the CPU"),
        (True, OWN_LOSS, "fused_linear_cross_entropy replaces the model's forward"),
        (True, ON_CPU, "use_liger_kernel=True replaces the rotation of all models"),
        (True, {"reward_device": {"model": 0, "score": "cpu"}}, "use_liger_kernel=True replaces the rotation of all"),
    ],
)
def test_liger_kernels_where_they_cannot_work_are_refused(config, monkeypatch, installed, options, message):
    monkeypatch.setattr(config_checks, "is_liger_kernel_available", lambda: installed)
    with pytest.raises(ValueError, match=message):
        config(use_liger_kernel=True, **options)


def test_liger_kernels_without_the_rotation_leave_models_on_the_cpu_alone(config):
    with pytest.raises(ValueError) as error:  # for this run is on the CPU
        config(use_liger_kernel=True, liger_kernel_config='{"rope": false}', **ON_CPU)
    assert "rotation" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, accelerate joins the processes")
def test_a_rank_that_was_started_alone_is_refused(config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"launcher started 2 processes.* use_cpu: true"):
        config(use_cpu=False)


# ---- Evaluation ----


@pytest.mark.parametrize(
    ("options", "evaluates"), [({}, False), ({"eval_on_start": True}, True), ({"eval_strategy": "epoch"}, True)]
)
def test_what_asks_for_evaluation(config, options, evaluates):
    assert config(**options).evaluates is evaluates


def test_best_model_is_that_of_the_highest_reward(config):
    every_step = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    args = config(load_best_model_at_end=True, **every_step)
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)
    args = config(save_strategy="best", eval_strategy="epoch")
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)
    chosen = {"metric_for_best_model": "eval_kl", "greater_is_better": False}
    args = config(load_best_model_at_end=True, **every_step, **chosen)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_kl", False)


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "max"),
        ({"metric_for_best_model": "kl", "greater_is_better": False}, "min"),
        ({"lr_scheduler_kwargs": '{"mode": "min", "patience": 3}'}, "min"),
    ],
)
def test_schedulers_that_follow_a_metric_know_which_way_is_better(config, scheduler, options, mode):
    args = config(lr_scheduler_type=scheduler, eval_strategy="epoch", **options)
    assert args.lr_scheduler_kwargs["mode"] == mode
    assert ("patience" in args.lr_scheduler_kwargs) == ("lr_scheduler_kwargs" in options)
    assert "mode" not in (config(lr_scheduler_type="linear").lr_scheduler_kwargs or {})


def test_checkpointing_that_a_rollout_under_zero3_would_lose_is_refused(config, monkeypatch):
    options = {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}
    config(**options)
    monkeypatch.setattr(config_checks, "is_zero3", lambda plugin: True)
    with pytest.raises(ValueError, match="every_n_layers and offload cannot be used with ZeRO-3"):
        config(**options)
    with pytest.raises(ValueError, match="every_n_layers and offload cannot be used with ZeRO-3"):
        config(gradient_checkpointing_kwargs={"offload": True})
    config(gradient_checkpointing_kwargs={"use_reentrant": False})
    config(gradient_checkpointing_kwargs={"offload": True}, use_vllm=True)  # TRL does not turn it off there


def test_ratios_of_sequences_averaged_per_token_are_warned_of(config, caplog):
    config(importance_sampling_level="sequence")
    assert "GSPO has token_weighting='sequence'" in caplog.text
    caplog.clear()
    config(variant="gspo")
    assert "GSPO" not in caplog.text


def test_lists_may_be_tuples(config):
    assert config(reward_weights=(1.0, 2)).reward_weights == (1.0, 2)


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_backward_take_micro_batches_whole(config, optim):
    with pytest.raises(ValueError, match=f"max_tokens_per_microbatch cannot be used with optim='{optim}'"):
        config(optim=optim, max_tokens_per_microbatch=99)


SEVERAL_PASSES = [{"gradient_accumulation_steps": 2}, {"max_tokens_per_microbatch": 99}]


@pytest.mark.parametrize("options", SEVERAL_PASSES)
def test_one_rank_has_no_graph_of_ddp(config, options):
    assert config(ddp_static_graph=True, **options).ddp_static_graph


@pytest.mark.parametrize("options", SEVERAL_PASSES)
def test_a_static_graph_of_ddp_has_one_backward_pass_per_update(config, two_ranks, options):
    with pytest.raises(ValueError, match="ddp_static_graph=True lets DDP do one backward pass per update only"):
        config(ddp_static_graph=True, **options)
    assert config(ddp_static_graph=True).ddp_static_graph


def test_pieces_under_fsdp_are_refused(config, monkeypatch):
    monkeypatch.setattr(config_checks, "is_fsdp", lambda: True)
    with pytest.raises(ValueError, match="max_tokens_per_microbatch cannot be used with FSDP"):
        config(max_tokens_per_microbatch=99)
