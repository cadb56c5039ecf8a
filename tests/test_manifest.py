"""Checkpoints that are all or nothing, as folders."""

import json
import os
import re
from pathlib import Path

import pytest

from grpo_trl import manifest


def folder(path, **files):
    path.mkdir(parents=True)
    for name, text in (files or {"weights": "one", "state": "two"}).items():
        (path / name).write_text(text)
    return path


def complete(path, **files):
    manifest.write(folder(path, **files))
    return path


def test_a_folder_is_complete_when_its_manifest_is_written(tmp_path):
    made = folder(tmp_path / "checkpoint-1")
    (made / "inner").mkdir()
    (made / "inner" / "x").write_bytes(b"123")
    assert not manifest.is_complete(made)
    assert "manifest.json is missing: the writing of this checkpoint was interrupted" in manifest.problems(made)[0]
    manifest.write(made)
    assert manifest.problems(made) == [] and manifest.is_complete(made)
    files = json.loads((made / "manifest.json").read_text())["files"]
    assert files.keys() == {"weights", "state", "inner/x"}
    # of the three bytes "123", by sha256sum
    digest = "a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3"
    assert files["inner/x"] == {"size": 3, "sha256": digest}
    assert manifest.holds(made, "inner/x") and not manifest.holds(made, "y")


def test_files_are_on_the_disk_before_the_manifest_and_it_before_its_name(tmp_path, monkeypatch):
    made, events = folder(tmp_path / "checkpoint-1"), []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("named"), move(*paths)))
    manifest.write(made)
    assert set(events[:2]) == {str(made / "weights"), str(made / "state")}
    assert events[2:] == [str(made), str(made / "_manifest.json"), "named", str(made), str(tmp_path)]


@pytest.mark.parametrize(
    ("damage", "problem", "by_size"),
    [
        (lambda made: (made / "state").unlink(), "state is missing", True),
        (lambda made: (made / "state").write_text("tw"), "state has 2 bytes, was written with 3", True),
        (
            lambda made: (made / "state").write_text("twi"),
            "state is corrupt: its content is not what was written",
            False,
        ),
        (lambda made: (made / "manifest.json").write_text("{"), r"manifest.json is corrupt \(JSONDecodeError", True),
        (lambda made: (made / "manifest.json").write_text("[]"), r"manifest.json is corrupt \(TypeError", True),
        (lambda made: (made / "manifest.json").unlink(), "manifest.json is missing", True),
    ],
)
def test_what_is_wrong_is_named(tmp_path, damage, problem, by_size):
    made = complete(tmp_path / "checkpoint-1")
    damage(made)
    (found,) = manifest.problems(made)
    assert re.match(problem, found)
    assert manifest.is_complete(made) is not by_size


def test_the_newest_is_the_one_written_last(tmp_path):
    complete(tmp_path / "checkpoint-4")
    folder(tmp_path / "checkpoint-9")  # incomplete
    complete(tmp_path / "checkpoint-2")  # of a run that went back
    folder(tmp_path / "checkpoint-x")
    complete(tmp_path / "checkpoint-2.bak")
    assert [path.name for path in manifest.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-9", "checkpoint-2"]


def test_rotation_counts_complete_ones_and_keeps_what_it_is_told(tmp_path):
    made = [complete(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    folder(tmp_path / "checkpoint-5")
    manifest.rotate(tmp_path, None, [])
    manifest.rotate(tmp_path, 0, [])
    manifest.rotate(tmp_path, 5, [])  # more than there are
    assert len(list(tmp_path.iterdir())) == 5
    manifest.rotate(tmp_path, 2, [made[3], made[0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]
    manifest.rotate(tmp_path, 1, [made[3]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]
    manifest.rotate(tmp_path, 1, [tmp_path / "checkpoint-5"])
    assert manifest.is_complete(made[3])  # the only complete one


def test_what_rotation_keeps_may_be_named_from_the_current_folder(tmp_path, monkeypatch):
    made = [complete(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    monkeypatch.chdir(tmp_path)
    manifest.rotate(tmp_path, 1, [Path("checkpoint-1")])
    assert made[0].exists() and not made[1].exists()


def test_a_run_that_dies_while_it_deletes_a_checkpoint_leaves_none(tmp_path, monkeypatch):
    def die(path, **options):
        if path.exists():
            raise KeyboardInterrupt

    made = complete(tmp_path / "checkpoint-1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest.shutil, "rmtree", die)
        manifest.remove(made)
    manifest.recover(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_written_anew_keeps_the_old_one_until_it_is_complete(tmp_path):
    made = complete(tmp_path / "checkpoint-1", state="old")
    manifest.set_aside(made)
    assert not made.exists()
    folder(made, state="half")  # killed here
    manifest.recover(tmp_path)
    assert (made / "state").read_text() == "old" and manifest.is_complete(made)
    manifest.set_aside(made)
    complete(made, state="new")  # killed here
    manifest.recover(tmp_path)
    assert (made / "state").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    manifest.set_aside(made)
    complete(made, state="newer")
    manifest.drop_aside(made)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_a_run_that_died_had_half_deleted_goes(tmp_path):
    kept, gone = complete(tmp_path / "checkpoint-2"), complete(tmp_path / "checkpoint-1")
    gone.rename(tmp_path / "_checkpoint-1")
    (tmp_path / "_checkpoint-1" / "manifest.json").unlink()
    manifest.recover(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


def test_an_incomplete_one_makes_room(tmp_path):
    made = folder(tmp_path / "checkpoint-1")
    manifest.set_aside(made)
    assert list(tmp_path.iterdir()) == []
