"""A full disk, said as one: libraries that write checkpoints have errors of their own for it, some without a path."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_WORDS = (
    "No space left",
    "File too large",
    "PytorchStreamWriter",
    "inline_container",
    "quota exceeded",
    "iostream error",
)


@contextlib.contextmanager
def disk_errors_named(folder: Path, last_checkpoint: Path | None) -> Iterator[None]:
    """What goes wrong with the disk while a checkpoint is written into `folder` is an OSError that says so, with the
    space left and the checkpoint to go on from. Other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_of_the_disk(error):
            raise
        free = shutil.disk_usage(folder.parent).free
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"{folder} could not be written: {type(error).__name__}: {error}. {free / 1e6:.0f} MB are free there. "
            f"This checkpoint is incomplete; the last complete one is {last_checkpoint or 'none'}. Free space (a "
            "lower save_total_limit, save_only_model, another output_dir) and resume from that one",
        ) from error


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk that is full, over its quota, broken or read-only caused it."""
    return getattr(error, "errno", None) in _CODES or any(word in str(error) for word in _WORDS)
