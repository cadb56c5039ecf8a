"""`generation_kwargs`: each option of transformers is a field of ours, acts, or is refused with the reason."""

import json
from dataclasses import replace

import pytest
from transformers import CompileConfig, GenerationConfig

from grpo_trl import GRPOConfig
from grpo_trl.generation_kwargs import FIELDS, REFUSED, USABLE
from tests.rollouts.test_hf_generate import SAMPLING, ids_of, rollout
from tests.test_trainer import logged, trainer

INTERNAL = {"_from_model_config", "transformers_version"}


def config(path, **generation_kwargs) -> GRPOConfig:
    return GRPOConfig(str(path), use_cpu=True, report_to="none", generation_kwargs=generation_kwargs)


def test_every_option_of_transformers_is_decided_on():
    options = set(vars(GenerationConfig())) - INTERNAL
    decided = [*FIELDS, *USABLE, *REFUSED]
    assert options - set(decided) == set()
    assert len(decided) == len(set(decided))  # one place each


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_effect_or_does_harm_is_refused_with_the_reason(tmp_path, name):
    with pytest.raises(ValueError) as error:
        config(tmp_path, **{name: 2, "min_new_tokens": 2})
    assert f"generation_kwargs {name} cannot be used ({name}: {REFUSED[name]})" in str(error.value)
    assert "min_new_tokens" not in str(error.value).replace(REFUSED[name], "")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("min_new_token", r"did you mean min_new_tokens\?"),
        ("topp", r"did you mean top_p\?"),
        ("max_completion_length", r"use one of temperature, .*min_new_tokens"),
        ("update", "use one of"),  # a method of GenerationConfig
    ],
)
def test_unknown_options_are_refused_with_the_nearest_name(tmp_path, name, hint):
    with pytest.raises(ValueError, match=f"generation_kwargs {name} is unknown; {hint}"):
        config(tmp_path, **{name: 5})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exponential_decay_length_penalty", [3]),
        ("exponential_decay_length_penalty", ["a", 1.0]),
        ("exponential_decay_length_penalty", [3, float("nan")]),
        ("sequence_bias", [[[5], float("inf")]]),
        ("sequence_bias", {"a": 1.0}),
        ("sequence_bias", []),
        ("sequence_bias", {(5,): 1.0, 6: 1.0}),
        ("sequence_bias", {(5,): -10}),
        ("sequence_bias", [[[5], -10]]),
        ("sequence_bias", [[[1, 2], "b"]]),
        ("compile_config", {"fulgraph": False}),
    ],
)
def test_values_that_transformers_would_find_in_a_rollout(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"generation_kwargs {name}=.*: expected "):
        config(tmp_path, **{name: value})


def test_values_of_several_parts(tmp_path):
    options = {"exponential_decay_length_penalty": [3, 1.1], "sequence_bias": [[[20], -5.0], [[21, 22], 1.0]]}
    assert config(tmp_path, **options).generation_kwargs == options
    assert config(tmp_path, sequence_bias={(20,): -5.0}).generation_kwargs == {"sequence_bias": [[[20], -5.0]]}


@pytest.mark.parametrize("options", [{"sequence_bias": {(20,): -5.0}}, {"compile_config": CompileConfig()}])
def test_trackers_can_write_the_arguments(tmp_path, options):
    (name,) = options
    written = json.loads(config(tmp_path, **options).to_json_string())["generation_kwargs"]
    assert name in written and config(tmp_path, **written)


def test_values_that_say_what_happens_anyway(tmp_path):
    assert config(tmp_path, do_sample=True, num_beams=1, num_return_sequences=1).generation_kwargs is None
    with pytest.raises(ValueError, match="do_sample, num_beams cannot be used"):
        config(tmp_path, do_sample=False, num_beams=2)


def test_all_problems_are_said_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        config(tmp_path, typical_p=0.2, max_time=1.0, min_new_token=5)
    for part in (
        "typical_p, max_time cannot be used",
        "use temperature, top_p",
        "the clock",
        "min_new_token is unknown",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "acts"),
    [
        ({"bad_words_ids": [[token] for token in range(7, 130)]}, True),
        ({"suppress_tokens": list(range(7, 130))}, True),
        ({"begin_suppress_tokens": list(range(7, 130))}, True),
        ({"sequence_bias": [[[20], 9.0]]}, True),
        ({"exponential_decay_length_penalty": (2, 1.5)}, True),
        ({"min_new_tokens": 10}, True),
        ({"no_repeat_ngram_size": 1}, True),
        ({"use_cache": False}, False),
        ({"max_cache_len": 64}, False),
        ({"disable_compile": True}, False),
    ],
)
def test_what_is_usable_acts_and_what_is_about_speed_changes_nothing(qwen3, options, acts):
    assert options.keys() <= set(USABLE)
    changed = rollout(qwen3, sampling=replace(SAMPLING, generation_kwargs=options))
    assert (ids_of(changed) != ids_of(rollout(qwen3))) is acts


def test_usable_options_reach_the_rollout_of_a_run(tmp_path):
    run = trainer(tmp_path, generation_kwargs={"min_new_tokens": 6}, max_steps=1)
    run.train()
    assert run.train_sampling.generation_kwargs == {"min_new_tokens": 6}
    assert logged(run, "completions/min_length")[0] >= 6
