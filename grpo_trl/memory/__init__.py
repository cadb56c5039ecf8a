"""The memory that a run will take, from configurations alone."""

from .changes import ranked_changes
from .models import PolicySpec
from .plan import Run, plan_run
from .table import advice_lines, parse_size, plan_table

__all__ = ["PolicySpec", "Run", "advice_lines", "parse_size", "plan_run", "plan_table", "ranked_changes"]
