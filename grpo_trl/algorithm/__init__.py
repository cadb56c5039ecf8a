"""The mathematics of GRPO: pure functions on tensors, with torch and the standard library only."""

from .advantages import combine_rewards, group_advantages, informative_groups
from .loss import KL_ESTIMATORS, SURROGATES, policy_loss
from .token_weights import token_weights
from .variants import LOSS_TYPES, VARIANTS, Variant

__all__ = [
    "KL_ESTIMATORS",
    "LOSS_TYPES",
    "SURROGATES",
    "VARIANTS",
    "Variant",
    "combine_rewards",
    "group_advantages",
    "informative_groups",
    "policy_loss",
    "token_weights",
]
