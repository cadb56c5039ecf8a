"""What a run shows and leaves behind: what is where, plot, completions, epoch folders, prompt memory, diagnoses, and
the reference that follows the policy."""

from .completions import log_completions, printable, read_parquet, write_parquet
from .device_table import DeviceTableCallback, ModelRow, device_table, model_rows
from .epoch_export import EpochExportCallback, recipe_yaml
from .loss_note import LossNoteCallback, loss_note
from .metrics_plot import MetricsPlotCallback, plot_metrics
from .prompt_memory_export import PROMPT_MEMORY_NAME, PromptMemoryCallback
from .run_doctor import RunDoctorCallback, diagnose
from .sync_reference import SyncReferenceCallback, mix_into_reference

__all__ = [
    "PROMPT_MEMORY_NAME",
    "DeviceTableCallback",
    "EpochExportCallback",
    "LossNoteCallback",
    "MetricsPlotCallback",
    "ModelRow",
    "PromptMemoryCallback",
    "RunDoctorCallback",
    "SyncReferenceCallback",
    "device_table",
    "diagnose",
    "log_completions",
    "loss_note",
    "mix_into_reference",
    "model_rows",
    "plot_metrics",
    "printable",
    "read_parquet",
    "recipe_yaml",
    "write_parquet",
]
