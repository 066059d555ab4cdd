"""Folders in shared places: gone at the end, and after a kill at the next start."""

from __future__ import annotations

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
