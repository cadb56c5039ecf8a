"""The mathematics of GRPO: pure functions on tensors, with torch and the standard library only."""

from .advantages import (
    AGGREGATIONS,
    combine_rewards,
    group_advantages,
    informative_groups,
    passed,
    relative_rewards,
)
from .entropy import entropy_bonus, top_entropy_mask
from .loss import IMPORTANCE_SAMPLING_LEVELS, KL_ESTIMATORS, SAMPLER_CORRECTIONS, SURROGATES, policy_loss
from .token_weights import token_weights
from .variants import LOSS_TYPES, VARIANTS, Variant

__all__ = [
    "AGGREGATIONS",
    "IMPORTANCE_SAMPLING_LEVELS",
    "KL_ESTIMATORS",
    "LOSS_TYPES",
    "SAMPLER_CORRECTIONS",
    "SURROGATES",
    "VARIANTS",
    "Variant",
    "combine_rewards",
    "entropy_bonus",
    "group_advantages",
    "informative_groups",
    "passed",
    "policy_loss",
    "relative_rewards",
    "token_weights",
    "top_entropy_mask",
]
