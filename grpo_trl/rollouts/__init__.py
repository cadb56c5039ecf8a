"""How completions are sampled."""

from .context import weights_for_generation
from .engine import ENGINES, RolloutEngine, check_engine, make_engine
from .groups import decode_completions, ordered_groups
from .sampling import EVAL_STREAM, SamplingParams

__all__ = [
    "ENGINES",
    "EVAL_STREAM",
    "RolloutEngine",
    "SamplingParams",
    "check_engine",
    "decode_completions",
    "make_engine",
    "ordered_groups",
    "weights_for_generation",
]
