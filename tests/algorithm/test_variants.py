import dataclasses
import re

import pytest

from grpo_trl.algorithm import AGGREGATIONS, KL_ESTIMATORS, LOSS_TYPES, SURROGATES, VARIANTS, Variant
from grpo_trl.algorithm.advantages import BASELINES, SCALE_REWARDS
from grpo_trl.algorithm.loss import IMPORTANCE_SAMPLING_LEVELS
from grpo_trl.algorithm.token_weights import TOKEN_WEIGHTINGS

FIELDS = {field.name for field in dataclasses.fields(Variant)}
CHOICES = {
    "surrogate": SURROGATES,
    "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
    "multi_objective_aggregation": AGGREGATIONS,
    "advantage_baseline": BASELINES,
    "scale_rewards": SCALE_REWARDS,
    "token_weighting": TOKEN_WEIGHTINGS,
    "kl_estimator": KL_ESTIMATORS,
}

rows = pytest.mark.parametrize("name", VARIANTS)


@rows
def test_names_a_paper(name):
    assert re.search(r"arXiv \d{4}\.\d{5}", VARIANTS[name].paper)


@rows
def test_is_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS[name].beta = 1.0


@rows
def test_names_existing_parts(name):
    for field, choices in CHOICES.items():
        assert getattr(VARIANTS[name], field) in choices, field


@rows
def test_numbers_are_sensible(name):
    variant = VARIANTS[name]
    assert 0 < variant.epsilon < 1
    assert variant.epsilon_high is None or variant.epsilon_high >= variant.epsilon
    # a smaller bound would cut into the trust region
    assert variant.delta is None or variant.delta > 1 + (variant.epsilon_high or variant.epsilon)
    assert variant.beta >= 0 and variant.entropy_coef >= 0
    assert 0 < variant.top_entropy_quantile <= 1
    assert variant.surrogate != "cispo" or variant.epsilon_high >= 1  # there it bounds the ratio itself
    for field in ("mask_truncated_completions", "overlong_penalty", "dynamic_sampling"):
        assert isinstance(getattr(variant, field), bool)


def test_seed_row():
    """The defaults of the project's seed: symmetric clip .2, KL .01, batch-relative rewards, each token alike."""
    assert dataclasses.asdict(VARIANTS["grpo"]) | {"paper": ""} == {
        "paper": "",
        "surrogate": "clip",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
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


def test_deepseekmath_row():
    """arXiv 2402.03300: equation 3 averages over a completion first, equation 4 is k3, section 4.2 has KL .04."""
    row, seed = VARIANTS["deepseekmath"], VARIANTS["grpo"]
    changed = {name: getattr(row, name) for name in FIELDS - {"paper"} if getattr(row, name) != getattr(seed, name)}
    assert changed == {"scale_rewards": "group", "token_weighting": "sequence", "beta": 0.04, "kl_estimator": "k3"}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types_name_existing_parts(loss_type):
    parts = LOSS_TYPES[loss_type]
    assert parts and parts.keys() <= FIELDS
    for field, value in parts.items():
        assert field not in CHOICES or value in CHOICES[field]


def test_loss_types_average_as_trl_does():
    weightings = {name: parts["token_weighting"] for name, parts in LOSS_TYPES.items()}
    assert weightings == {
        "grpo": "sequence", "sapo": "sequence", "dr_grpo": "max_length", "luspo": "sequence_sum",
        "dapo": "token", "bnpo": "token", "cispo": "token", "vespo": "token",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dapo", {"epsilon_high": 0.28, "scale_rewards": "group", "beta": 0.0, "mask_truncated_completions": True,
                  "overlong_penalty": True, "dynamic_sampling": True}),
        ("dr_grpo", {"scale_rewards": "none", "token_weighting": "max_length", "beta": 0.0}),
        ("gspo", {"importance_sampling_level": "sequence", "token_weighting": "sequence", "epsilon": 3e-4,
                  "epsilon_high": 4e-4, "scale_rewards": "group", "beta": 0.0}),
        ("cispo", {"surrogate": "cispo", "epsilon_high": 5.0, "scale_rewards": "group", "beta": 0.0}),
        ("bnpo", {"scale_rewards": "group", "beta": 0.0}),
        ("rloo", {"advantage_baseline": "leave_one_out", "scale_rewards": "none", "token_weighting": "sequence_sum",
                  "beta": 0.03}),
        ("reinforce_pp_baseline", {"kl_estimator": "k2"}),
        ("sapo", {"surrogate": "sapo", "token_weighting": "sequence", "scale_rewards": "group", "beta": 0.0}),
        ("luspo", {"importance_sampling_level": "sequence", "token_weighting": "sequence_sum", "epsilon": 2e-3,
                   "epsilon_high": 2.5e-3, "scale_rewards": "group", "beta": 0.0}),
        ("vespo", {"surrogate": "vespo", "scale_rewards": "group", "beta": 0.0}),
        ("intellect2", {"delta": 4.0, "scale_rewards": "group", "beta": 0.001}),
        ("top_entropy", {"top_entropy_quantile": 0.2, "epsilon_high": 0.28, "scale_rewards": "group", "beta": 0.0,
                         "mask_truncated_completions": True, "overlong_penalty": True, "dynamic_sampling": True}),
        ("gdpo", {"multi_objective_aggregation": "normalize_then_sum", "beta": 0.0}),
    ],
)  # fmt: skip
def test_rows_differ_from_the_seed_by_what_their_papers_say(name, expected):
    row, seed = VARIANTS[name], VARIANTS["grpo"]
    assert {n: getattr(row, n) for n in FIELDS - {"paper"} if getattr(row, n) != getattr(seed, n)} == expected
