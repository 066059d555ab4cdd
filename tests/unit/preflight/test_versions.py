"""Whether the key packages are those that fit together."""

from __future__ import annotations

import pytest

from slime.preflight import versions
from slime.preflight.versions import ALWAYS, check_versions, compare, pins
from tests.fakes.launches import launch, teacher


def test_pins_are_read_and_a_builds_mark_does_not_count() -> None:
    text = "# torch==1\ntorch==2.13.0\nray==2.60.0  # why\n\nnumpy\n"
    assert pins(text) == {"torch": "2.13.0", "ray": "2.60.0"}
    assert list(compare({"torch": "2.13.0+cpu", "ray": "2.60.0"}, pins(text), "cpu.txt")) == []


def test_what_is_missing_is_an_error_and_another_version_a_warning() -> None:
    there = {"torch": "2.12.1", "ray": None, "wandb": None, "numpy": "1"}
    missing, others = compare(there, {"torch": "2.13.0", "ray": "2.60.0"}, "cpu.txt")
    assert (missing.what, missing.fatal) == ("not installed: ray, wandb", True)
    assert "scripts/setup.sh" in missing.remedy
    assert others.what == ("other versions than requirements/cpu.txt pins: torch is 2.12.1, tested is 2.13.0")
    assert not others.fatal


@pytest.mark.parametrize(
    ("flags", "gpus", "more"),
    [
        ((), (), set()),
        (("--use-wandb",), (), {"wandb"}),
        (("--train-backend", "megatron"), (), {"megatron-core"}),
        ((), ("0", "1"), {"sglang"}),
        (("--engine", "transformers"), ("0", "1"), set()),
    ],
)
def test_what_is_asked_for_depends_on_the_run(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], gpus: tuple[str, ...], more: set[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(versions, "installed", lambda name: asked.append(name))
    (finding,) = check_versions(launch(*flags, student_gpus=gpus))
    assert finding.fatal
    assert set(asked) == {*ALWAYS, *more}


def test_sglang_on_a_cpu_lives_in_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIME_SGLANG_PYTHON", "/no/such/python")
    monkeypatch.setattr(versions, "installed", lambda name: pins_of_cpu()[name])
    (finding,) = check_versions(launch(teacher=teacher("teacher", engine="sglang")))
    assert finding.fatal
    assert "SGLang is not installed for /no/such/python" in finding.what


def pins_of_cpu() -> dict[str, str]:
    return pins((versions.REQUIREMENTS / "cpu.txt").read_text())
