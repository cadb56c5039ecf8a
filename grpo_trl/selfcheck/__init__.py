"""The self-test behind `grpo-trl check`: a recipe's own model, data and rewards, tried before a long run."""

from .checks import CHECKS, Check, Result
from .report import check_table, reward_table, verdict
from .run import run_checks, shortened

__all__ = ["CHECKS", "Check", "Result", "check_table", "reward_table", "run_checks", "shortened", "verdict"]
