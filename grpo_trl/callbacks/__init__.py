"""What a run shows and leaves behind: plot, completions, epoch folders, and the reference that follows the policy."""

from .completions import log_completions
from .epoch_export import EpochExportCallback, recipe_yaml
from .loss_note import LossNoteCallback, loss_note
from .metrics_plot import MetricsPlotCallback, plot_metrics
from .sync_reference import SyncReferenceCallback, mix_into_reference

__all__ = [
    "EpochExportCallback",
    "LossNoteCallback",
    "MetricsPlotCallback",
    "SyncReferenceCallback",
    "log_completions",
    "loss_note",
    "mix_into_reference",
    "plot_metrics",
    "recipe_yaml",
]
