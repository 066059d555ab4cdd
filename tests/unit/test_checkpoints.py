"""A checkpoint is there whole or not at all, and is found by its own folder or by the folder of all."""

from __future__ import annotations

import pytest

from slime.checkpoints import RunState, begin_checkpoint, finish_checkpoint, resume_point


def _save(folder, rollout_id, **fields):
    partial = begin_checkpoint(folder, rollout_id)
    (partial / "trainer").mkdir()
    (partial / "trainer" / "weights").write_text(str(rollout_id))
    return finish_checkpoint(partial, RunState(rollout_id=rollout_id, **fields))


def test_a_new_run_begins_at_zero():
    assert resume_point(None) == (RunState(), None)


def test_the_newest_of_a_folder_is_found(tmp_path):
    _save(tmp_path, 5)
    newest = _save(tmp_path, 10, student_tokens=7, student_before=0.25, data={"epoch": 1})
    state, checkpoint = resume_point(str(tmp_path))
    assert checkpoint == newest
    assert state == RunState(rollout_id=10, student_tokens=7, student_before=0.25, data={"epoch": 1})


def test_one_checkpoint_is_found_by_its_own_folder(tmp_path):
    older = _save(tmp_path, 5)
    _save(tmp_path, 10)
    state, checkpoint = resume_point(str(older))
    assert (state.rollout_id, checkpoint) == (5, older)


def test_a_checkpoint_that_was_never_finished_is_not_found(tmp_path):
    _save(tmp_path, 5)
    begin_checkpoint(tmp_path, 10)
    state, _ = resume_point(str(tmp_path))
    assert state.rollout_id == 5


def test_saving_again_replaces(tmp_path):
    _save(tmp_path, 5, student_tokens=1)
    (begin_checkpoint(tmp_path, 5) / "leftover").write_text("")
    path = _save(tmp_path, 5, student_tokens=2)
    assert resume_point(str(tmp_path))[0].student_tokens == 2
    assert not (path / "leftover").exists()


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--load"):
        resume_point(str(tmp_path))
