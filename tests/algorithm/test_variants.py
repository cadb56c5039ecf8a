import dataclasses
import re

import pytest

from grpo_trl.algorithm import KL_ESTIMATORS, LOSS_TYPES, SURROGATES, VARIANTS, Variant
from grpo_trl.algorithm.advantages import SCALE_REWARDS
from grpo_trl.algorithm.loss import IMPORTANCE_SAMPLING_LEVELS
from grpo_trl.algorithm.token_weights import TOKEN_WEIGHTINGS

FIELDS = {field.name for field in dataclasses.fields(Variant)}
CHOICES = {
    "surrogate": SURROGATES,
    "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
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
    assert variant.beta >= 0
    assert isinstance(variant.mask_truncated_completions, bool)


def test_seed_row():
    """The defaults of the project's seed: symmetric clip .2, KL .01, batch-relative rewards, each token alike."""
    assert dataclasses.asdict(VARIANTS["grpo"]) | {"paper": ""} == {
        "paper": "",
        "surrogate": "clip",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "scale_rewards": "batch_relative",
        "token_weighting": "token",
        "beta": 0.01,
        "kl_estimator": "k3_ratio",
        "mask_truncated_completions": False,
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
        assert value in CHOICES[field]


def test_loss_types_average_as_trl_does():
    weightings = {name: LOSS_TYPES[name]["token_weighting"] for name in ("grpo", "dapo", "dr_grpo")}
    assert weightings == {"grpo": "sequence", "dapo": "token", "dr_grpo": "max_length"}
