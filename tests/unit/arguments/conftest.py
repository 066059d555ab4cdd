"""A minimal good command line, and a parser that gives back what was printed on failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from slime.arguments import Args, parse_args

MINIMAL = ("--hf-checkpoint", "student", "--prompt-data", "train.parquet", "--num-rollout", "3")
DISTILLATION = ("--use-opd", "--opd-type", "sglang", "--rm-url", "http://127.0.0.1:13141/generate")


@pytest.fixture
def parsed() -> Callable[..., Args]:
    """Parse the minimal distillation run with more flags behind it."""

    def parse(*flags: str) -> Args:
        return parse_args([*MINIMAL, *DISTILLATION, *flags])

    return parse


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Parse a command line that must be refused with status 2, and return its message on one line."""

    def refuse(*flags: str, base: tuple[str, ...] = (*MINIMAL, *DISTILLATION)) -> str:
        with pytest.raises(SystemExit) as stop:
            parse_args([*base, *flags])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return " ".join(message.split())

    return refuse
