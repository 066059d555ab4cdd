"""What a user is told of a `--sglang-*` flag that the installed SGLang does not take.

A stand-in for SGLang's Python prints the parser's report; the tests marked `sglang` ask the real parser.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slime.arguments import parse_args
from slime.engines.sglang_flags import check_sglang_flags, flag_problems

KNOWN = ["--mem-fraction-static", "--tensor-parallel-size", "--tp-size", "--disable-radix-cache"]
GOOD: dict[str, Any] = {"version": "9.9", "known": KNOWN, "unknown": [], "unexpected": [], "refused": None}


@pytest.mark.parametrize(
    ("words", "found", "message"),
    [
        (["--mem-fraction-static", "0.5"], {}, None),
        (
            ["--mem-fraction-statik", "0.5"],
            {"unknown": ["--mem-fraction-statik"]},
            "unknown flag --sglang-mem-fraction-statik: SGLang has no --mem-fraction-statik; did you mean "
            "--sglang-mem-fraction-static?",
        ),
        (
            ["--zzz"],
            {"unknown": ["--zzz"]},
            "unknown flag --sglang-zzz: SGLang has no --zzz; nothing is near it.",
        ),
        (
            ["--mem-fraction-static", "much"],
            {"refused": "argument --mem-fraction-static: invalid float value: 'much'"},
            "SGLang refuses --sglang-mem-fraction-static: invalid float value: 'much'",
        ),
        (
            ["--tp-size", "two"],
            {"refused": "argument --tensor-parallel-size/--tp-size: invalid int value: 'two'"},
            "SGLang refuses --sglang-tp-size: invalid int value: 'two'",
        ),
        (
            ["--schedule"],
            {"refused": "ambiguous option: --schedule could match --schedule-policy"},
            "SGLang refuses the --sglang-* flags: ambiguous option: --sglang-schedule could match "
            "--sglang-schedule-policy",
        ),
        (
            ["--disable-radix-cache", "true"],
            {"unexpected": ["true"]},
            "unexpected words among the --sglang-* flags: true. A flag was given more values than SGLang's "
            "takes: --sglang-disable-radix-cache true",
        ),
    ],
)
def test_every_mistake_is_told_in_the_users_flags(
    words: list[str], found: dict[str, Any], message: str | None
) -> None:
    assert list(flag_problems(GOOD | found, words)) == ([] if message is None else [message])


def stand_in(folder: Path, script: str) -> dict[str, str]:
    """Return an environment whose SGLang Python notes its arguments and runs `script`."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *find_spec*) exit 0;; esac\necho "$*" >> {folder}/asked\n{script}\n'
    )
    python.chmod(0o755)
    return {"PATH": os.environ["PATH"], "SLIME_SGLANG_PYTHON": str(python)}


def test_all_mistakes_are_raised_at_once_with_the_version_that_was_asked(tmp_path: Path) -> None:
    report = json.dumps(GOOD | {"unknown": ["--mem-fraction-statik", "--zzz"]})
    env = stand_in(tmp_path, f"echo 'a plugin prints'; echo '{report}'")
    with pytest.raises(ValueError, match="unknown flag --sglang-zzz") as caught:
        check_sglang_flags(["--mem-fraction-statik", "0.5", "--zzz"], gpus=[0], env=env)
    assert "did you mean --sglang-mem-fraction-static?" in str(caught.value)
    assert f"SGLang 9.9 of {tmp_path / 'python'} was asked" in str(caught.value)
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.endswith("sglang_serve.py --check --model-path any --mem-fraction-statik 0.5 --zzz")


def test_good_flags_pass(tmp_path: Path) -> None:
    check_sglang_flags(["--x"], gpus=[0], env=stand_in(tmp_path, f"echo '{json.dumps(GOOD)}'"))
    assert (tmp_path / "asked").exists()


def test_without_flags_nothing_is_asked(tmp_path: Path) -> None:
    check_sglang_flags([], gpus=None, env=stand_in(tmp_path, "exit 1"))
    check_sglang_flags([], gpus=None, env={"SLIME_SGLANG_PYTHON": "/nowhere"})
    assert not (tmp_path / "asked").exists()


def test_a_broken_sglang_shows_its_error(tmp_path: Path) -> None:
    env = stand_in(tmp_path, "echo 'ImportError: libcuda' >&2; exit 3")
    with pytest.raises(RuntimeError, match=r"ended with status 3.*\nImportError: libcuda"):
        check_sglang_flags(["--x"], gpus=[0], env=env)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--sglang-mem-fraction-statik", "0.5"),
            "unknown flag --sglang-mem-fraction-statik.*did you mean --sglang-mem-fraction-static",
        ),
        (
            ("--sglang-mem-fraction-static", "much"),
            "SGLang refuses --sglang-mem-fraction-static: invalid float value: 'much'",
        ),
        (
            ("--sglang-attention-backend", "none-such"),
            "SGLang refuses --sglang-attention-backend: invalid choice: 'none-such'",
        ),
        (("--sglang-disable-radix-cache", "true"), "unexpected words.*: true"),
        (("--sglang-cuda-graph-bs", "1"), "ambiguous option: --sglang-cuda-graph-bs could match --sglang-"),
        (("--sglang-help",), "flags: it prints something and ends"),
        (("--sglang-mem-fraction-static", "0.5", "--sglang-disable-radix-cache"), None),
        (("--sglang-chunked-prefill-size", "-1", "--sglang-cuda-graph-bs-decode", "1", "2"), None),
    ],
)
@pytest.mark.sglang
def test_the_real_parser(flags: Sequence[str], message: str | None) -> None:
    args = parse_args(
        [
            *("--hf-checkpoint", "student", "--prompt-data", "x.parquet", "--num-rollout", "1"),
            *("--engine", "sglang", "--rm-type", "math", *flags),
        ]
    )
    words = args.sglang_command_line()
    if message is None:
        check_sglang_flags(words, gpus=None, env=os.environ)
        return
    with pytest.raises(ValueError, match=message):
        check_sglang_flags(words, gpus=None, env=os.environ)
