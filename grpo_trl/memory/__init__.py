"""The memory that a run will take, from configurations alone."""

from .changes import Advice, best_change
from .models import PolicySpec
from .plan import DevicePlan, Plan, Planner, Run
from .table import advice_text, parse_size, plan_table, size_text

__all__ = [
    "Advice",
    "DevicePlan",
    "Plan",
    "Planner",
    "PolicySpec",
    "Run",
    "advice_text",
    "best_change",
    "parse_size",
    "plan_table",
    "size_text",
]
