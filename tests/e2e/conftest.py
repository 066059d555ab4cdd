"""Data and a teacher that the jobs of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.engines.process import ServerProcess
from tests.fakes.jobs import start_teacher, write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows of train and test."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A living teacher."""
    with start_teacher(tmp_path_factory.mktemp("teacher") / "teacher.log") as server:
        yield server
