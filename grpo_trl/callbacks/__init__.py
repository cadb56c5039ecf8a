"""What a run shows and leaves behind: plot, completions, epoch folders, prompt memory, and the reference that follows
the policy."""

from .completions import log_completions, read_parquet, write_parquet
from .epoch_export import EpochExportCallback, recipe_yaml
from .loss_note import LossNoteCallback, loss_note
from .metrics_plot import MetricsPlotCallback, plot_metrics
from .prompt_memory_export import PROMPT_MEMORY_NAME, PromptMemoryCallback
from .sync_reference import SyncReferenceCallback, mix_into_reference

__all__ = [
    "PROMPT_MEMORY_NAME",
    "EpochExportCallback",
    "LossNoteCallback",
    "MetricsPlotCallback",
    "PromptMemoryCallback",
    "SyncReferenceCallback",
    "log_completions",
    "loss_note",
    "mix_into_reference",
    "plot_metrics",
    "read_parquet",
    "recipe_yaml",
    "write_parquet",
]
