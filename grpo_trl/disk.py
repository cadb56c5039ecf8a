"""Files that are whole or not there, and a full disk, said as one: libraries that write have errors of their own for
it, some without a path."""

import contextlib
import errno
import os
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
def in_one_move(path: Path) -> Iterator[Path]:
    """A file to write, which becomes `path` when it is whole: nobody reads half of one. Makes the folder.

    Raises:
        OSError: as `disk_errors_named`.
    """
    temporary = path.with_name(f"_{path.name}")  # `_*` is what a push to the Hub leaves out
    with disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def disk_errors_named(
    path: Path, remedy: str = "Free space, and resume from the last checkpoint, if there is one"
) -> Iterator[None]:
    """What goes wrong with the disk while a file or folder is written is an OSError that says so, with the space left
    and what to do; of several around each other, the outermost speaks. Other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_of_the_disk(error):
            raise
        cause = error.__cause__ or error
        free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
        raise OSError(
            getattr(cause, "errno", None) or errno.ENOSPC,
            f"{path} could not be written: {type(cause).__name__}: {cause}. {free / 1e6:.0f} MB are free there. "
            f"{remedy}",
        ) from cause


def is_of_the_disk(error: BaseException) -> bool:
    """Whether a disk that is full, over its quota, broken or read-only caused it."""
    return getattr(error, "errno", None) in _CODES or any(word in str(error) for word in _WORDS)
