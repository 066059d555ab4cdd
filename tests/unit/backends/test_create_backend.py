"""What is refused before a process group is joined."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.backends import create_backend
from tests.fakes.training import DISTILL, make_args


def test_the_environment_must_say_where_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(
        RuntimeError, match=r"^MASTER_PORT, LOCAL_RANK not set in the environment of training rank 3"
    ):
        create_backend(make_args(Path("model"), *DISTILL), 3, 4)
