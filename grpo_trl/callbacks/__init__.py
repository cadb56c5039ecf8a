"""What a run shows and leaves behind: plot, completions, epoch folders, and the reference that follows the policy."""

from grpo_trl.callbacks.completions import log_completions
from grpo_trl.callbacks.epoch_export import EpochExportCallback, recipe_yaml
from grpo_trl.callbacks.loss_note import LossNoteCallback, loss_note
from grpo_trl.callbacks.metrics_plot import MetricsPlotCallback, plot_metrics
from grpo_trl.callbacks.sync_reference import SyncReferenceCallback, mix_into_reference

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
