"""Folders in shared places: gone at the end, and after a kill at the next start."""

from __future__ import annotations

import fcntl
import os

from slime.scratch import ScratchFolder


def test_it_is_named_after_its_process_and_gone_when_closed(tmp_path):
    with ScratchFolder(tmp_path / "new", "ours-") as folder:
        assert folder.path.name.startswith(f"ours-{os.getpid()}-")
        (folder.path / "content").mkdir()
    assert not folder.path.exists()
    folder.close()


def test_a_killed_runs_folder_is_removed_and_a_living_ones_is_not(tmp_path):
    killed, foreign = tmp_path / "ours-1-dead", tmp_path / "theirs-1"
    for folder in (killed, foreign):
        folder.mkdir()
        (folder / ".lock").touch()
    unlocked = tmp_path / "ours-without-lock"
    unlocked.mkdir()
    with ScratchFolder(tmp_path, "ours-") as first, ScratchFolder(tmp_path, "ours-") as second:
        assert not killed.exists()
        assert foreign.exists()
        assert unlocked.exists()
        assert first.path.exists()
        assert second.path.exists()


def test_it_bears_its_name_only_when_it_is_locked(tmp_path, monkeypatch):
    """Before that, another run that starts at the same moment would take it for one of a killed run."""
    lock, named = fcntl.flock, []

    def look_and_lock(*arguments):
        named.append(list(tmp_path.glob("ours-*")))
        lock(*arguments)

    monkeypatch.setattr(fcntl, "flock", look_and_lock)
    with ScratchFolder(tmp_path, "ours-") as folder:
        assert list(tmp_path.iterdir()) == [folder.path]
    assert named == [[]]
