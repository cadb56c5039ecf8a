"""What a run shows and leaves behind: what is where, plot, completions, epoch folders, and the reference that follows the policy."""

from .completions import log_completions
from .device_table import DeviceTableCallback, ModelRow, device_table, model_rows
from .epoch_export import EpochExportCallback, recipe_yaml
from .loss_note import LossNoteCallback, loss_note
from .metrics_plot import MetricsPlotCallback, plot_metrics
from .sync_reference import SyncReferenceCallback, mix_into_reference

__all__ = [
    "DeviceTableCallback",
    "EpochExportCallback",
    "LossNoteCallback",
    "MetricsPlotCallback",
    "ModelRow",
    "SyncReferenceCallback",
    "device_table",
    "log_completions",
    "loss_note",
    "mix_into_reference",
    "model_rows",
    "plot_metrics",
    "recipe_yaml",
]
