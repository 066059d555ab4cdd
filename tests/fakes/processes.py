"""What tests do to processes: wait for one to end; hold a server while requests reach it, then kill it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ESTABLISHED = "01"
PATIENCE_SECONDS = 120.0
HOLD_SECONDS = 120.0
PAUSE_SECONDS = 8.0
"""How long a server that may owe all answers is kept from giving them."""


def heed_interrupts() -> None:
    """Between fork and exec: take SIGINT as by default. Tests in the background inherit it ignored, and bash
    could not trap it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(true: Callable[[], object], what: str) -> None:
    """Return once `true()` holds; fail where it takes longer than two minutes."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_SECONDS:g} s"
        time.sleep(0.05)


def ended(pid: int) -> bool:
    """Tell whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_with_requests(server: psutil.Process, port: int, going_on: Callable[[], bool]) -> None:
    """Stop the server at `port`, wait until a request lies unread at it, kill it with SIGKILL.

    A server that was stopped when it had just read all that there was is let go on, and stopped again. Fail
    if no request comes although `going_on()` holds for two minutes, or if that does not hold any more.
    """
    server.suspend()
    stopped = time.monotonic()
    deadline = stopped + HOLD_SECONDS
    while unread_bytes(port) == 0:
        assert going_on(), "what should ask the server has ended"
        assert time.monotonic() < deadline, f"nothing was sent to port {port} in {HOLD_SECONDS:g} s"
        if time.monotonic() - stopped > PAUSE_SECONDS:
            server.resume()
            time.sleep(0.3)
            server.suspend()
            stopped = time.monotonic()
        time.sleep(0.02)
    server.kill()


def unread_bytes(port: int) -> int:
    """Return how much has been sent to a local TCP port and not been read there."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(
        int(row[4].split(":")[1], 16)
        for row in rows
        if row[3] == ESTABLISHED and int(row[1].split(":")[1], 16) == port
    )
