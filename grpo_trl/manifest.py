"""Checkpoints that are all or nothing: a folder is one when its manifest, written last, says so.

`manifest.json` lists every other file with its size and SHA-256. Files are flushed to the disk before it is written,
so what it says holds after a kill and after a power failure alike. Nothing here knows what the files mean.
"""

import hashlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # what transformers calls the folder of a step


class ResumeError(ValueError):
    """A run cannot go on from a checkpoint; the message says why, and what to do."""


def write(folder: Path) -> None:
    """Makes a checkpoint complete: flushes its files to the disk, then writes their sizes and hashes.

    Call it once all ranks have written theirs.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    with ThreadPoolExecutor(max_workers=8) as threads:  # hashing releases the interpreter's lock
        entries = list(threads.map(lambda name: _flushed(folder / name), names))
    for directory in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush(directory)
    temporary = folder / f"_{NAME}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"saved_at": time.time(), "files": dict(zip(names, entries, strict=True))}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)
    _flush(folder)
    _flush(folder.parent)


def problems(folder: Path, *, contents: bool = True) -> list[str]:
    """What keeps a folder from being a complete checkpoint, each naming the file; [] for a complete one.

    contents: compare hashes too, which reads every file.
    """
    if not folder.is_dir():
        return ["there is no such folder"]
    if not (folder / NAME).is_file():
        return [f"{NAME} is missing: the writing of this checkpoint was interrupted, or another program wrote it"]
    try:
        files = _read(folder)["files"]
        expected = [(name, entry["size"], entry["sha256"]) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{NAME} is corrupt ({type(error).__name__}: {error})"]
    found = []
    sound = []
    for name, size, digest in expected:
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes, was written with {size}")
        else:
            sound.append((name, digest))
    if contents:
        with ThreadPoolExecutor(max_workers=8) as threads:
            digests = threads.map(lambda item: _digest(folder / item[0]), sound)
            found += [
                f"{name} is corrupt: its content is not what was written"
                for (name, digest), now in zip(sound, digests, strict=True)
                if now != digest
            ]
    return found


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has all its files in full, by their sizes."""
    return not problems(folder, contents=False)


def holds(folder: Path, name: str) -> bool:
    """Whether a complete checkpoint has a file of this name."""
    return name in _read(folder)["files"]


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders of checkpoints, complete or not, oldest first: by the time of their manifest, or where there is none
    by that of their last change."""
    folders = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: (_saved_at(path), _step(path)))


def set_aside(folder: Path) -> None:
    """Makes room for a checkpoint that is about to be written: a complete one of the same step is kept under another
    name until the new one is complete; an incomplete one goes."""
    if is_complete(folder):
        shutil.rmtree(_aside(folder), ignore_errors=True)
        os.replace(folder, _aside(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)


def drop_aside(folder: Path) -> None:
    """Ends what `set_aside` began. The manifest goes first: a checkpoint that is half deleted is not complete."""
    (_aside(folder) / NAME).unlink(missing_ok=True)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Puts back what was set aside where the run died before a new checkpoint was complete; deletes the rest of it."""
    for aside in output_dir.glob("_checkpoint-*"):
        folder = aside.with_name(aside.name[1:])
        if is_complete(aside) and not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
        else:
            drop_aside(folder)


def rotate(output_dir: Path, limit: int | None, keep: list[Path]) -> None:
    """Removes the oldest complete checkpoints beyond `limit`, never one of `keep`. None and 0: no limit.

    Incomplete ones are neither counted nor removed.
    """
    if not limit:
        return
    complete = [path for path in checkpoints(output_dir) if is_complete(path)]
    kept = {path.resolve() for path in keep}
    removable = [path for path in complete if path.resolve() not in kept]
    for path in removable[: max(0, len(complete) - limit)]:
        remove(path)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, under another name: what is left when the run dies meanwhile is deleted by `recover`."""
    shutil.rmtree(_aside(folder), ignore_errors=True)
    os.replace(folder, _aside(folder))
    drop_aside(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f"_{folder.name}")  # `_*` is what a push to the Hub leaves out


def _step(folder: Path) -> int:
    match = CHECKPOINT.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _saved_at(folder: Path) -> float:
    try:
        return float(_read(folder)["saved_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.stat().st_mtime


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NAME).read_text(encoding="utf-8"))


def _flushed(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is on the disk afterwards."""
    _flush(path)
    return {"size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
