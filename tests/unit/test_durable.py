"""What is written is whole under its name, and on the disk before it has the name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slime import durable
from slime.durable import (
    FolderInUseError,
    begin_folder,
    finish_folder,
    locked,
    remove_folder,
    remove_leftovers,
    sync_tree,
    write_file,
)


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """Note what is flushed and renamed, in order."""
    done: list[str] = []
    sync, rename, replace = durable._sync, Path.rename, os.replace

    def note_sync(path):
        done.append(f"sync {path.name}")
        sync(path)

    def note_rename(path, target):
        done.append(f"rename {path.name} {target.name}")
        return rename(path, target)

    def note_replace(source, target):
        done.append(f"rename {source.name} {target.name}")
        replace(source, target)

    monkeypatch.setattr(durable, "_sync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(os, "replace", note_replace)
    return done


def test_a_folder_is_flushed_with_all_in_it_before_it_gets_its_name(tmp_path, synced):
    partial = begin_folder(tmp_path / "made")
    (partial / "inner").mkdir()
    (partial / "inner" / "file").write_text("x")
    finish_folder(partial, tmp_path / "made")
    assert (tmp_path / "made" / "inner" / "file").read_text() == "x"
    assert synced == [
        *("sync file", "sync inner", "sync .made.partial"),
        "rename .made.partial made",
        f"sync {tmp_path.name}",
    ]


def test_a_file_is_flushed_before_it_replaces_another(tmp_path, synced):
    (tmp_path / "latest").write_text("old")
    write_file(tmp_path / "latest", "new")
    assert (tmp_path / "latest").read_text() == "new"
    assert synced == [
        "sync .latest.partial",
        "rename .latest.partial latest",
        f"sync {tmp_path.name}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_folder_that_is_there_is_replaced_whole(tmp_path):
    for number in (1, 2):
        partial = begin_folder(tmp_path / "made")
        (partial / f"file-{number}").write_text("")
        finish_folder(partial, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file-2"]


def test_a_folder_loses_its_name_before_its_files(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(durable.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    begin_folder(tmp_path / "other")
    (tmp_path / ".latest.partial").write_text("")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_belongs_to_one_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with locked(folder), pytest.raises(FolderInUseError, match=f"{folder} belongs to a run"), locked(folder):
        pass
    with locked(folder):
        pass


def test_an_earlier_attempt_is_forgotten(tmp_path):
    (begin_folder(tmp_path / "made") / "half").write_text("")
    assert list(begin_folder(tmp_path / "made").iterdir()) == []


def test_what_cannot_be_flushed_is_an_error(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        sync_tree(tmp_path)
