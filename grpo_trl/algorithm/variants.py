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
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    multi_objective_aggregation: str = "sum_then_normalize"
    advantage_baseline: str = "group_mean"
    scale_rewards: str = "batch_relative"
    token_weighting: str = "token"
    beta: float = 0.01
    kl_estimator: str = "k3_ratio"
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    mask_truncated_completions: bool = False
    overlong_penalty: bool = False
    dynamic_sampling: bool = False


_DAPO = {
    "epsilon_high": 0.28,
    "scale_rewards": "group",
    "beta": 0.0,
    "mask_truncated_completions": True,
    "overlong_penalty": True,
    "dynamic_sampling": True,
}
_GROUP = {"scale_rewards": "group", "beta": 0.0}

VARIANTS: dict[str, Variant] = {
    # This project's own: token-level PPO-clip, relative rewards standardised over the whole batch, KL 0.01.
    "grpo": Variant(paper="arXiv 2402.03300, with relative rewards standardised globally and token weighting"),
    # Section 4.1 and equation 3: advantages normalised per group, mean over each completion's tokens first;
    # equation 4: the k3 estimator; section 4.2: KL coefficient 0.04. The paper states no clip range; 0.2 is PPO's
    # (arXiv 1707.06347).
    "deepseekmath": Variant(
        paper="arXiv 2402.03300", scale_rewards="group", token_weighting="sequence", beta=0.04, kl_estimator="k3"
    ),
    # Section 2.3: no KL; 3.1 and 4.1: clip range [0.8, 1.28]; 3.2: dynamic sampling; equation 8: every token counts
    # the same; 3.4: truncated completions leave the loss, long ones are punished softly.
    "dapo": Variant(paper="arXiv 2503.14476", **_DAPO),
    # Section 3.2: no division by the standard deviation nor by the completion's length.
    "dr_grpo": Variant(paper="arXiv 2503.20783", scale_rewards="none", token_weighting="max_length", beta=0.0),
    # Equations 5 to 7: one ratio per completion; section 5.1: its clip range.
    "gspo": Variant(
        paper="arXiv 2507.18071",
        importance_sampling_level="sequence",
        token_weighting="sequence",
        epsilon=3e-4,
        epsilon_high=4e-4,
        **_GROUP,
    ),
    # Equations 4 and 5. The paper tunes the upper bound without stating it; 5 is ScaleRL's (arXiv 2510.13786).
    "cispo": Variant(paper="arXiv 2506.13585", surrogate="cispo", epsilon_high=5.0, **_GROUP),
    # The loss of this name in TRL: a mean over tokens. The paper's normalisation by a Beta distribution is not in it.
    "bnpo": Variant(paper="arXiv 2506.02864, its averaging rule alone, as in TRL", **_GROUP),
    # Leave-one-out baseline, sums over tokens; appendix C: KL coefficient 0.03. Here the KL is a term of the loss, in
    # the paper one of the reward.
    "rloo": Variant(
        paper="arXiv 2402.14740",
        advantage_baseline="leave_one_out",
        scale_rewards="none",
        token_weighting="sequence_sum",
        beta=0.03,
    ),
    # "REINFORCE++ w/ Baseline": group mean as baseline, then normalised over the batch; KL by k2. The paper's
    # coefficient depends on the task; 0.01 here.
    "reinforce_pp_baseline": Variant(paper="arXiv 2501.03262", kl_estimator="k2"),
    # The gate's temperatures: 1.0 and 1.05.
    "sapo": Variant(paper="arXiv 2511.20347", surrogate="sapo", token_weighting="sequence", **_GROUP),
    # GSPO's ratio with the length taken out of the average; section 5.1: the clip range.
    "luspo": Variant(
        paper="arXiv 2602.05261",
        importance_sampling_level="sequence",
        token_weighting="sequence_sum",
        epsilon=2e-3,
        epsilon_high=2.5e-3,
        **_GROUP,
    ),
    # k and lambda of the two signs: 2, 3 and 3, 2.
    "vespo": Variant(paper="arXiv 2602.10693", surrogate="vespo", **_GROUP),
    # Section 4.1: epsilon 0.2, delta 4, KL coefficient 0.001.
    "intellect2": Variant(paper="arXiv 2505.07291", delta=4.0, scale_rewards="group", beta=0.001),
    # Section 5: DAPO on the fifth of tokens with the highest entropy.
    "top_entropy": Variant(paper="arXiv 2506.01939", top_entropy_quantile=0.2, **_DAPO),
    # Each reward normalised within its group, their sum over the batch.
    "gdpo": Variant(paper="arXiv 2601.05242", multi_objective_aggregation="normalize_then_sum", beta=0.0),
}

# TRL's `loss_type`, shorthand for a surrogate, an averaging rule and what else the name implies there: wins over the
# row, loses to explicit fields.
LOSS_TYPES: dict[str, dict[str, object]] = {
    "grpo": {"surrogate": "clip", "token_weighting": "sequence"},
    "dapo": {"surrogate": "clip", "token_weighting": "token"},
    "bnpo": {"surrogate": "clip", "token_weighting": "token"},
    "dr_grpo": {"surrogate": "clip", "token_weighting": "max_length"},
    "luspo": {"surrogate": "clip", "token_weighting": "sequence_sum"},
    "sapo": {"surrogate": "sapo", "token_weighting": "sequence"},
    "cispo": {"surrogate": "cispo", "token_weighting": "token", "epsilon_high": 5.0},
    "vespo": {"surrogate": "vespo", "token_weighting": "token"},
}
