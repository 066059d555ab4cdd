"""A process group, as scripts/lib.sh sees it: alive while one of it runs, whoever waits to be reaped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import psutil
import pytest

from tests.fakes.launcher import REPOSITORY
from tests.fakes.processes import ended, wait_until


def group_alive(pid: int) -> bool:
    """Ask the script's own function."""
    command = 'source scripts/lib.sh; group_alive "$1"'
    return (
        subprocess.run(["bash", "-c", command, "bash", str(pid)], cwd=REPOSITORY, check=False).returncode == 0
    )


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[bytes]]:
    """A leader with a child that outlives it."""
    command = ["bash", "-c", "sleep 600 & wait"]
    process = subprocess.Popen(command, start_new_session=True)
    wait_until(lambda: psutil.Process(process.pid).children(), "the child starts")
    yield process
    process.kill()
    process.wait()


def test_a_group_ends_with_its_last_process_though_its_leader_is_never_reaped(
    leader: subprocess.Popen[bytes],
) -> None:
    assert group_alive(leader.pid)
    (child,) = psutil.Process(leader.pid).children()
    leader.kill()
    wait_until(lambda: ended(leader.pid), "the leader ends")
    assert group_alive(leader.pid)
    child.kill()
    wait_until(lambda: ended(child.pid), "the child ends")
    assert not group_alive(leader.pid)
    assert psutil.Process(leader.pid).status() == psutil.STATUS_ZOMBIE
