"""The split of a machine's GPUs, for every size the launcher promises, and the sentences where none fits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slime.ray.placement import PlacementError, main, plan_placement


def _ids(start: int, stop: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(start, stop))


@pytest.mark.parametrize(
    ("num_gpus", "teacher", "actor", "rollout"),
    [
        (16, _ids(0, 8), _ids(8, 12), _ids(12, 16)),
        (8, _ids(0, 4), _ids(4, 6), _ids(6, 8)),
        (4, _ids(0, 2), _ids(2, 3), _ids(3, 4)),
        (3, _ids(0, 1), _ids(1, 2), _ids(2, 3)),
    ],
)
def test_half_is_the_teachers_and_the_rest_trains_and_generates(num_gpus, teacher, actor, rollout):
    turns = plan_placement(num_gpus)
    assert turns.actor_gpus == turns.rollout_gpus == actor + rollout
    assert (turns.colocated, turns.weight_sync) == (True, "tensor")
    placement = plan_placement(num_gpus, colocate=False)
    assert turns.teacher_gpus == placement.teacher_gpus
    assert (placement.colocated, placement.weight_sync) == (False, "distributed")
    assert (placement.teacher_gpus, placement.actor_gpus, placement.rollout_gpus) == (teacher, actor, rollout)
    assert placement.teacher_tp == len(teacher)
    assert placement.student_gpus == actor + rollout
    assert (placement.teacher_engine, placement.engine) == ("sglang", "sglang")
    assert placement.num_engines == len(rollout)
    assert not set(placement.teacher_gpus) & set(placement.student_gpus)


def test_two_gpus_give_one_to_the_teacher_and_share_the_other():
    placement = plan_placement(2)
    assert placement.teacher_gpus == ("0",)
    assert placement.actor_gpus == placement.rollout_gpus == placement.student_gpus == ("1",)
    assert placement.shared
    assert (placement.teacher_engine, placement.engine) == ("sglang", "sglang")
    assert placement.colocated
    assert not placement.small_models
    apart = plan_placement(2, colocate=False)
    assert (apart.shared, apart.engine, apart.weight_sync) == (True, "transformers", "disk")


@pytest.mark.parametrize(
    ("num_gpus", "per_engine", "engines"),
    [
        (16, 1, "8 | 9 | 10 | 11 | 12 | 13 | 14 | 15: 8 sglang engines, --tp 1"),
        (16, 4, "8-11 | 12-15: 2 sglang engines, --tp 4"),
        (8, 1, "4 | 5 | 6 | 7: 4 sglang engines, --tp 1"),
        (2, 1, "1: 1 sglang engine, --tp 1"),
        (1, 1, "0: 1 transformers engine, --tp 1"),
    ],
)
def test_a_plan_prints_the_engines_their_tp_and_their_gpus(num_gpus, per_engine, engines):
    plan = plan_placement(num_gpus, gpus_per_engine=per_engine).describe()
    assert f"engines   {engines}" in plan
    assert ("by turns (--colocate)" in plan) == (num_gpus > 1)


def test_one_gpu_is_shared_by_all_and_says_so():
    placement = plan_placement(1)
    assert placement.teacher_gpus == placement.actor_gpus == placement.rollout_gpus == ("0",)
    assert (placement.teacher_engine, placement.engine) == ("transformers", "transformers")
    assert placement.small_models


@pytest.mark.parametrize("engine", ["sglang", "transformers", None])
def test_no_gpu_runs_on_the_cpu(engine):
    placement = plan_placement(0, engine=engine)
    assert placement.student_gpus == placement.teacher_gpus == ()
    assert placement.num_engines == placement.teacher_tp == 1
    assert placement.engine == placement.teacher_engine == (engine or "transformers")
    assert "No GPU" in placement.describe()


def test_an_external_teacher_leaves_all_gpus_to_the_student():
    placement = plan_placement(8, teacher_site="elsewhere")
    assert placement.teacher_gpus == ()
    assert placement.actor_gpus == placement.rollout_gpus == _ids(0, 8)
    assert plan_placement(1, teacher_site="elsewhere").shared


@pytest.mark.parametrize(("num_gpus", "actor", "rollout"), [(8, _ids(0, 4), _ids(4, 8)), (1, ("0",), ("0",))])
def test_without_a_teacher_all_gpus_are_the_students_and_no_teacher_is_spoken_of(num_gpus, actor, rollout):
    placement = plan_placement(num_gpus, teacher_site="none", colocate=False)
    assert (placement.teacher_gpus, placement.actor_gpus, placement.rollout_gpus) == ((), actor, rollout)
    assert "teacher" not in placement.describe()
    assert "teacher" not in plan_placement(0, teacher_site="none").describe()


def test_overrides_move_the_border_and_name_what_is_idle():
    assert plan_placement(16, num_gpus_teacher=4).student_gpus == _ids(4, 16)
    assert plan_placement(16, num_gpus_student=4).teacher_gpus == _ids(0, 8)
    placement = plan_placement(8, num_gpus_teacher=2, num_gpus_student=4)
    assert placement.student_gpus == _ids(2, 6)
    assert placement.idle_gpus == _ids(6, 8)
    assert "idle" in placement.describe()


def test_engines_span_as_many_gpus_as_asked():
    placement = plan_placement(16, gpus_per_engine=2, colocate=False)
    assert (placement.num_engines, placement.gpus_per_engine) == (2, 2)
    turns = plan_placement(16, gpus_per_engine=2)
    assert (turns.num_engines, turns.engine_gpus[0]) == (4, ("8", "9"))


def test_named_gpus_are_used_in_their_order():
    placement = plan_placement(4, gpu_ids=["4", "5", "6", "7", "8"])
    assert placement.teacher_gpus == ("4", "5")
    assert placement.student_gpus == ("6", "7")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"num_gpus": 8, "num_gpus_teacher": 3}, "1, 2, 4, 8"),
        ({"num_gpus": 8, "num_gpus_teacher": 8}, "SLIME_SCRIPT_NUM_GPUS_STUDENT"),
        ({"num_gpus": 8, "num_gpus_teacher": 4, "num_gpus_student": 8}, "at most 8"),
        ({"num_gpus": 8, "num_gpus_student": 8}, "SLIME_SCRIPT_TEACHER_URL"),
        ({"num_gpus": 16, "num_gpus_teacher": 0}, "SLIME_SCRIPT_TEACHER_URL"),
        ({"num_gpus": 8, "num_gpus_teacher": 4, "teacher_site": "elsewhere"}, "unset one"),
        ({"num_gpus": 4, "num_gpus_student": 0, "teacher_site": "elsewhere"}, "at least 1"),
        ({"num_gpus": 8, "gpus_per_engine": 3}, "--rollout-num-gpus-per-engine"),
        ({"num_gpus": 8, "gpus_per_engine": 4, "colocate": False}, "does not divide"),
        ({"num_gpus": 8, "gpus_per_engine": 8}, "does not divide"),
        ({"num_gpus": 0, "colocate": True, "engine": "sglang"}, "SLIME_SCRIPT_COLOCATE"),
        ({"num_gpus": 8, "num_gpus_teacher": 4, "teacher_site": "none"}, "no teacher; unset it"),
        (
            {"num_gpus": 6, "gpus_per_engine": 2, "teacher_site": "none", "colocate": False},
            r"change it or SLIME_SCRIPT_NUM_GPUS\.",
        ),
        ({"num_gpus": 2, "gpus_per_engine": 2}, "--rollout-num-gpus-per-engine"),
        ({"num_gpus": 2, "engine": "sglang", "colocate": False}, "SLIME_SCRIPT_COLOCATE=1"),
        ({"num_gpus": 0, "num_gpus_teacher": 1}, "there is no GPU"),
        ({"num_gpus": -1}, "SLIME_SCRIPT_NUM_GPUS"),
        ({"num_gpus": 4, "gpu_ids": ["0", "1"]}, "only 2 GPUs are visible"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_by_name(arguments, names):
    with pytest.raises(PlacementError, match=names):
        plan_placement(**arguments)


def test_shell_assignments_survive_a_shell():
    command = (
        f'set -eu; eval "$({sys.executable} -m slime.ray.placement --num-gpus 16 --shell)"; '
        'echo "$TEACHER_GPUS|$TEACHER_TP|$STUDENT_GPUS|$NUM_ACTOR_GPUS|$NUM_ROLLOUT_GPUS|$ENGINE"; '
        'echo "$PLACEMENT"'
    )
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert answer.splitlines()[0] == "0,1,2,3,4,5,6,7|8|8,9,10,11,12,13,14,15|8|8|sglang"
    assert "8-15" in answer


def test_the_command_line_prints_a_sentence_and_fails(capsys):
    assert main(["--num-gpus", "8", "--num-gpus-teacher", "3"]) == 2
    assert "SLIME_SCRIPT_NUM_GPUS_TEACHER" in capsys.readouterr().err


def test_the_command_line_counts_named_gpus(capsys):
    assert main(["--gpu-ids", "2,3"]) == 0
    assert "teacher   2" in capsys.readouterr().out


def test_the_launcher_pays_for_no_heavy_import():
    heavy = "{'torch', 'ray', 'transformers', 'numpy'}"
    command = f"import sys, slime.ray.placement; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
