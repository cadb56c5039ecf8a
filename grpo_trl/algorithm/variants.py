"""Published objectives as rows of data: independent choices, no code per variant.

`variant: NAME` in a config picks a row; any field set explicitly wins over it. A new objective is one row (and, when
its surrogate is new, one function in `loss.SURROGATES`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One objective. Fields carry the names and meanings of `GRPOConfig`, where their help stands."""

    paper: str
    surrogate: str = "clip"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: symmetric, equal to epsilon
    delta: float | None = None
    scale_rewards: str = "batch_relative"
    token_weighting: str = "token"
    beta: float = 0.01
    kl_estimator: str = "k3_ratio"
    mask_truncated_completions: bool = False


VARIANTS: dict[str, Variant] = {
    # The project's seed: token-level PPO-clip, relative rewards standardised over the whole batch, KL 0.01.
    "grpo": Variant(paper="arXiv 2402.03300, with relative rewards standardised globally and token weighting"),
    # Section 4.1 and equation 3: advantages normalised per group, mean over each completion's tokens first;
    # equation 4: the k3 estimator; section 4.2: KL coefficient 0.04. The paper states no clip range; 0.2 is PPO's
    # (arXiv 1707.06347).
    "deepseekmath": Variant(
        paper="arXiv 2402.03300", scale_rewards="group", token_weighting="sequence", beta=0.04, kl_estimator="k3"
    ),
}

# TRL's `loss_type`, shorthand for a surrogate and an averaging rule: wins over the row, loses to explicit fields.
LOSS_TYPES: dict[str, dict[str, str]] = {
    "grpo": {"surrogate": "clip", "token_weighting": "sequence"},
    "dapo": {"surrogate": "clip", "token_weighting": "token"},
    "dr_grpo": {"surrogate": "clip", "token_weighting": "max_length"},
}
