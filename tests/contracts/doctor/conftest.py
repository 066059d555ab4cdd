"""Runs the doctor as its command line does, in this process."""

import json
from pathlib import Path

import pytest

from slime.engines.doctor.__main__ import main
from tests.contracts.doctor.support import STUDENT, Diagnosis, Examine


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    """Return a function that examines the servers at some URLs."""

    def run(*urls: str, student: Path | None = STUDENT, more: tuple[str, ...] = ()) -> Diagnosis:
        file = tmp_path / "doctor.json"
        argv = [word for url in urls for word in ("--teacher-url", url)]
        argv += ["--student-path", str(student)] if student else []
        argv += ["--timeout", "120", "--deadline", "240"]  # a busy machine is no fault of the teacher
        code = main([*argv, "--json", str(file), *more])
        written = json.loads(file.read_text())
        checks = {check["check"]: check for check in written["checks"]}
        return Diagnosis(code, capsys.readouterr().out, checks, written["healthy"])

    return run
