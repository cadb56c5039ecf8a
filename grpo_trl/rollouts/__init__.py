"""How completions are sampled."""

from .engine import ENGINES, RolloutEngine, check_engine, make_engine
from .sampling import EVAL_STREAM, SamplingParams

__all__ = ["ENGINES", "EVAL_STREAM", "RolloutEngine", "SamplingParams", "check_engine", "make_engine"]
