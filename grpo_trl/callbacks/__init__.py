"""What a run shows and leaves behind: plot, completions, epoch folders, diagnoses, and the reference that follows the
policy."""

from .completions import log_completions
from .epoch_export import EpochExportCallback, recipe_yaml
from .loss_note import LossNoteCallback, loss_note
from .metrics_plot import MetricsPlotCallback, plot_metrics
from .run_doctor import RunDoctorCallback, diagnose
from .sync_reference import SyncReferenceCallback, mix_into_reference

__all__ = [
    "EpochExportCallback",
    "LossNoteCallback",
    "MetricsPlotCallback",
    "RunDoctorCallback",
    "SyncReferenceCallback",
    "diagnose",
    "log_completions",
    "loss_note",
    "mix_into_reference",
    "plot_metrics",
    "recipe_yaml",
]
