"""The soak's plan and its verdict; the soak itself is a command, run small in tests/e2e/test_soak.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.checks.soak.faults import FAULTS, plan
from scripts.checks.soak.report import Outcome, report
from scripts.checks.soak.watch import Growth, Life, growth_of, role_of

STEADY = Growth(rollouts=200, first_megabytes=500, last_megabytes=510, first_files=60, last_files=61)
GOOD = Outcome(
    minutes=9.0,
    starts=2,
    faults=("driver killed",),
    planned_samples=48,
    trained_samples=48,
    rollout_ids=(0, 1, 2),
    planned_rollouts=3,
    growth=(("trainer", STEADY),),
    left=(),
    accuracy=(0.3, 0.9),
)


def test_every_kind_of_fault_comes_before_one_comes_twice() -> None:
    planned = plan(2 * len(FAULTS), 200, seed=3)
    names = [fault.name for _, fault in planned]
    assert set(names[: len(FAULTS)]) == set(names[len(FAULTS) :]) == {fault.name for fault in FAULTS}
    moments = [moment for moment, _ in planned]
    assert moments == sorted(set(moments))
    assert all(2 <= moment < 199 for moment in moments)
    assert planned == plan(2 * len(FAULTS), 200, seed=3)
    assert planned != plan(2 * len(FAULTS), 200, seed=4)


BAD = {
    "samples lost": ({"trained_samples": 47}, "47 samples were trained on, and 48 were planned"),
    "a rollout twice": ({"rollout_ids": (0, 1, 1, 2)}, "does not hold every rollout once"),
    "something left": ({"left": ("/dev/shm/x",)}, "left behind: /dev/shm/x"),
    "memory": ({"growth": (("engine", replace(STEADY, last_megabytes=710)),)}, "engine grew by 105 MB"),
    "files": ({"growth": (("driver", replace(STEADY, last_files=200)),)}, "driver opened 140 files"),
}


def test_a_good_outcome_has_no_problems() -> None:
    assert list(GOOD.problems()) == []
    assert report(GOOD).endswith("Nothing is lost, nothing is left.")
    assert "| trainer | 200 | 500 MB | 510 MB | 60 | 61 |" in report(GOOD)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str) -> None:
    changes, said = BAD[name]
    outcome = replace(GOOD, **changes)
    (problem,) = outcome.problems()
    assert said in problem
    assert f"**{problem}**" in report(outcome)


def test_growth_is_that_between_warm_up_and_end() -> None:
    life = Life("trainer")
    for rollout in range(60):
        life.rollouts.append(rollout)
        life.megabytes.append(300 + 20 * min(rollout, 10) + rollout)
        life.files.append(50)
    grown = growth_of(life)
    assert grown is not None
    assert grown.rollouts == 59
    assert grown.last_megabytes - grown.first_megabytes == pytest.approx(38)
    assert growth_of(Life("trainer", life.rollouts[:15], life.megabytes[:15], life.files[:15])) is None


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("python -m slime.train --hf-checkpoint x", "driver"),
        ("ray::TrainActor.train", "trainer"),
        (
            "python -m slime.engines.transformers_engine --model-path a/tiny/checkpoints/teacher --port 1",
            "teacher",
        ),
        ("python supervisor.py -m slime.engines.transformers_engine a/tiny/checkpoints/student", None),
        ("ray::IDLE", None),
    ],
)
def test_a_process_is_known_by_its_command_line(command: str, role: str | None) -> None:
    assert role_of(command) == role
