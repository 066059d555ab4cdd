"""The command that the launchers call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.preflight.__main__ import CHECKS, main, read_launch
from slime.preflight.launch import Download, Teacher
from tests.fakes.launches import CPU

FLAGS = ("--hf-checkpoint", "student", "--prompt-data", "train.parquet", "--num-rollout", "1", *CPU)


def test_what_the_launcher_knows_comes_before_the_runs_own_flags() -> None:
    own = (
        *(
            "--student-gpus",
            "2,3",
            "--teacher-path",
            "/teacher",
            "--teacher-gpus",
            "0,1",
            "--teacher-port",
            "1",
        ),
        *("--writes", "A", "/a", "--coming", "o/n", "/n", "model"),
    )
    launch = read_launch([*own, "--", *FLAGS])
    assert launch.args.hf_checkpoint == "student"
    assert launch.student_gpus == ("2", "3")
    assert launch.teacher == Teacher(path="/teacher", gpus=("0", "1"), engine="sglang", port=1)
    assert launch.folders == {"A": Path("/a")}
    assert launch.downloads == (Download("o/n", Path("/n"), "model"),)
    assert launch.is_coming("/n/train.parquet")
    assert not launch.is_coming("/nothing")
    alone = read_launch(["--", *FLAGS])
    assert (alone.teacher, alone.student_gpus) == (None, ())


def test_errors_go_to_stderr_with_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [*FLAGS, "--prompt-data", str(tmp_path / "none.parquet"), "--output-dir", "/proc/out"]
    assert main(["--", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "  error, folders: nothing can be written to /proc/out" in err
    assert f"  error, data: --prompt-data {tmp_path}/none.parquet is not there" in err
    assert len(CHECKS) == 9


def test_it_imports_neither_torch_nor_transformers() -> None:
    """They take seconds, and the preflight none."""
    program = (
        "import sys, slime.preflight.__main__\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
