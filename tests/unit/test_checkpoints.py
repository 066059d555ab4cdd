"""A checkpoint is there whole or not at all, and is found by its own folder or by the folder of all."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import pytest

from slime.checkpoints import (
    CheckpointError,
    Maker,
    RunState,
    begin_checkpoint,
    describe,
    find_checkpoint,
    finish_checkpoint,
    keep_newest,
    maker_of,
    require_same_run,
    resume_point,
)

CONFIG = {"model_type": "qwen3_vl", "dtype": "bfloat16", "text_config": {"num_hidden_layers": 2}}


@dataclass(frozen=True)
class _Args:
    hf_checkpoint: str
    num_rollout: int = 20
    train_backend: str = "fsdp"
    num_train_ranks: int = 2


@pytest.fixture
def args(tmp_path) -> _Args:
    return _Args(str(_model(tmp_path / "model")))


def _model(folder, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def _save(folder, rollout_id, maker=None, **fields):
    partial = begin_checkpoint(folder, rollout_id)
    (partial / "trainer").mkdir()
    (partial / "trainer" / "weights").write_text(str(rollout_id))
    maker = maker or Maker(train_backend="fsdp", num_train_ranks=1, model={})
    return finish_checkpoint(partial, RunState(rollout_id=rollout_id, **fields), maker)


def test_a_new_run_begins_at_zero():
    point = resume_point(None)
    assert (point.state, point.checkpoint, point.maker) == (RunState(), None, None)


def test_the_newest_of_a_folder_is_found(tmp_path):
    _save(tmp_path, 5)
    newest = _save(tmp_path, 10, student_tokens=7, student_before=0.25, data={"epoch": 1})
    point = resume_point(str(tmp_path))
    assert (point.checkpoint, point.note) == (newest, None)
    assert point.state == RunState(rollout_id=10, student_tokens=7, student_before=0.25, data={"epoch": 1})


def test_the_time_that_a_run_took_goes_on(tmp_path):
    _save(tmp_path, 5, started=time.monotonic() - 1000)
    state = resume_point(str(tmp_path)).state
    assert 1000 <= state.wall_seconds < 1100


def test_one_checkpoint_is_found_by_its_own_folder(tmp_path):
    older = _save(tmp_path, 5)
    _save(tmp_path, 10)
    point = resume_point(str(older))
    assert (point.state.rollout_id, point.checkpoint) == (5, older)


def test_a_checkpoint_that_was_never_finished_is_not_found_and_goes_with_the_next(tmp_path):
    _save(tmp_path, 5)
    begin_checkpoint(tmp_path, 10)
    assert resume_point(str(tmp_path)).state.rollout_id == 5
    _save(tmp_path, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "rollout-000005", "rollout-000015"]


def test_saving_again_replaces(tmp_path):
    _save(tmp_path, 5, student_tokens=1)
    (begin_checkpoint(tmp_path, 5) / "leftover").write_text("")
    path = _save(tmp_path, 5, student_tokens=2)
    assert resume_point(str(tmp_path)).state.student_tokens == 2
    assert not (path / "leftover").exists()


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="--load"):
        resume_point(str(tmp_path))


def _remove_file(path):
    (path / "trainer" / "weights").unlink()


def _cut_file(path):
    (path / "trainer" / "weights").write_text("")


def _cut_state(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:50])


def _remove_state(path):
    (path / "state.json").unlink()


DAMAGES = {
    "a file is not there": (_remove_file, "rollout-000010: its file trainer/weights is not there"),
    "a file is cut off": (_cut_file, "its file trainer/weights has 0 bytes and was written with 2"),
    "the state is cut off": (_cut_state, "rollout-000010: its state.json cannot be read"),
    "the state is not there": (_remove_state, "rollout-000010: its state.json is not there"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, name):
    damage, said = DAMAGES[name]
    older = _save(tmp_path, 5)
    damage(_save(tmp_path, 10))
    path, note = find_checkpoint(tmp_path)
    assert path == older
    assert note is not None
    assert said in note
    assert "latest names rollout-000010" in note
    assert note.endswith("The newest whole checkpoint is rollout-000005.")


@pytest.mark.parametrize("name", DAMAGES)
def test_where_none_is_whole_the_error_says_what_is_wrong_with_each(tmp_path, name):
    damage, said = DAMAGES[name]
    damage(_save(tmp_path, 10))
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole") as error:
        find_checkpoint(tmp_path)
    assert said in str(error.value)


def test_a_damaged_checkpoint_that_is_named_itself_is_refused(tmp_path):
    _save(tmp_path, 5)
    path = _save(tmp_path, 10)
    _cut_file(path)
    with pytest.raises(CheckpointError, match="weights has 0 bytes"):
        resume_point(str(path))


@pytest.mark.parametrize("marker", [None, "", "../elsewhere"])
def test_a_marker_that_names_nothing_gives_way_to_the_newest(tmp_path, marker):
    _save(tmp_path, 5)
    newest = _save(tmp_path, 1_000_000)
    if marker is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(marker)
    path, note = find_checkpoint(tmp_path)
    assert path == newest
    assert note is not None
    assert note.endswith("The newest whole checkpoint is rollout-1000000.")


def test_a_run_that_was_taken_up_earlier_goes_on_from_its_own_checkpoints(tmp_path):
    """Rollout 30 was left behind when the run was taken up at 10; it is the last resort."""
    ten, left_behind = _save(tmp_path, 10), _save(tmp_path, 30)
    eleven = _save(tmp_path, 11)
    assert find_checkpoint(tmp_path)[0] == eleven
    _remove_state(eleven)
    assert find_checkpoint(tmp_path)[0] == ten
    _remove_state(ten)
    assert find_checkpoint(tmp_path)[0] == left_behind


def test_the_newest_are_kept_and_what_is_beyond_them(tmp_path):
    for number in (10, 20, 30, 11, 12):
        newest = _save(tmp_path, number)
    keep_newest(newest, 0)
    assert len(list(tmp_path.glob("rollout-*"))) == 5
    keep_newest(newest, 2)
    assert sorted(path.name for path in tmp_path.glob("*rollout-*")) == [
        f"rollout-{number:06d}" for number in (11, 12, 20, 30)
    ]


def test_a_checkpoint_of_this_run_is_taken(args, tmp_path):
    _save(tmp_path / "saved", 10, maker_of(args))
    point = resume_point(str(tmp_path / "saved"))
    copy = _model(tmp_path / "copy", dtype="float32", transformers_version="6")
    require_same_run(replace(args, hf_checkpoint=str(copy)), point)
    assert list(describe(args, point)) == [f"Resuming from {point.checkpoint} (rollout 10 of 20)."]


def test_a_checkpoint_of_another_model_is_refused_and_the_difference_named(args, tmp_path):
    _save(tmp_path / "saved", 10, maker_of(args))
    deeper = _model(tmp_path / "deeper", text_config={"num_hidden_layers": 3})
    with pytest.raises(CheckpointError) as error:
        require_same_run(replace(args, hf_checkpoint=str(deeper)), resume_point(str(tmp_path / "saved")))
    assert "text_config.num_hidden_layers is 2 there and 3 here" in str(error.value)
    assert str(deeper) in str(error.value)


def test_a_checkpoint_of_another_backend_is_refused(args, tmp_path):
    _save(tmp_path / "saved", 10, maker_of(args))
    with pytest.raises(CheckpointError, match="with --train-backend fsdp, and this run has megatron"):
        require_same_run(replace(args, train_backend="megatron"), resume_point(str(tmp_path / "saved")))


def test_another_number_of_ranks_and_a_finished_run_are_said(args, tmp_path):
    _save(tmp_path / "saved", 10, maker_of(args))
    point = resume_point(str(tmp_path / "saved"))
    lines = list(describe(replace(args, num_train_ranks=1, num_rollout=10), point))
    assert "written by 2 training ranks and is read by 1" in lines[1]
    assert "random numbers seeded anew" in lines[1]
    assert "All 10 rollouts of this run are done" in lines[2]
    assert "a larger --num-rollout" in lines[2]


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    path = _save(tmp_path, 5)
    state = json.loads((path / "state.json").read_text())
    del state["maker"]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="has no maker: another version"):
        resume_point(str(tmp_path))
