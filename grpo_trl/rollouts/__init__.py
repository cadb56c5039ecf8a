"""How completions are sampled."""

from .context import Replica, make_replica, weights_for_generation
from .engine import ENGINES, RolloutEngine, check_engine, make_engine
from .groups import check_finite, decode_completions, ordered_groups
from .sampling import EVAL_STREAM, SamplingParams

__all__ = [
    "ENGINES",
    "EVAL_STREAM",
    "Replica",
    "RolloutEngine",
    "SamplingParams",
    "check_engine",
    "check_finite",
    "decode_completions",
    "make_engine",
    "make_replica",
    "ordered_groups",
    "weights_for_generation",
]
