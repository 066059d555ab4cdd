"""One server kept alive: started anew where it dies or hangs, as often as is allowed. Without Ray."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.engines.control import MemoryTag
    from slime.engines.process import ServerProcess

WATCH_SECONDS = 0.5
FAILED_CHECKS = 3
"""Health checks in a row that a server may not answer before it counts as hanging."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How patient a keeper is."""

    restarts: int
    start_timeout: float
    """Seconds that a server may take until it answers."""
    check_interval: float
    """Seconds between two looks at its health."""
    check_timeout: float


@dataclass
class Incarnation:
    """A server process, and the how-manieth it is."""

    server: ServerProcess
    number: int
    ready: bool = False
    released: set[MemoryTag] = field(default_factory=set)
    """Which of its memory it has given back."""


class Keeper:
    """Keeps one server. `watch` runs in a thread of its own, beside whatever else is called."""

    def __init__(self, name: str, launch: Callable[[], ServerProcess], limits: Limits) -> None:
        """Start the server by `launch`, which returns at once; `name` is what messages call it."""
        self._name = name
        self._launch = launch
        self._limits = limits
        self._generating = threading.Event()
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._restarting = threading.Lock()
        self.current = Incarnation(launch(), 0)

    def wait_ready(self) -> Incarnation:
        """Return once the server has answered, also one that has just been started anew.

        One that lives and was ready before is not asked again: paused, or without its memory, it says that it
        is not. If one whose memory is released has died it is started anew here, with all of its memory, so
        ask only while there is room for that.

        Raises:
            RuntimeError: it died or took too long; the message ends with its log.
        """
        while True:
            current = self.current
            if current.ready and current.server.alive:
                return current
            if current.released:
                self._restart(current, hangs=False)
                continue
            try:
                current.server.wait_ready(self._limits.start_timeout)
            except RuntimeError:
                first_start = not (current.ready or current.number)
                if first_start or current.server.alive or self._lost.is_set():
                    raise
                time.sleep(WATCH_SECONDS)  # `watch` starts the next one, or gives up
                continue
            current.ready = True
            return current

    def watch(self) -> None:
        """Start the server anew when it dies or hangs; return after `stop`.

        Raises:
            RuntimeError: it died once more than is allowed, or before it ever answered; the message ends with
                its log.
        """
        checked, failed = time.monotonic(), 0
        while not self._stopping.wait(WATCH_SECONDS):
            current = self.current
            if current.released:
                continue  # a new server would take the memory that others have now
            if not self._generating.is_set() or not current.ready:
                checked, failed = time.monotonic(), 0
            elif time.monotonic() - checked > self._limits.check_interval:
                failed = 0 if self._healthy(current.server) else failed + 1
                checked = time.monotonic()
            if failed == FAILED_CHECKS or not current.server.alive:
                self._restart(current, hangs=failed == FAILED_CHECKS)
                checked, failed = time.monotonic(), 0

    def set_generating(self, generating: bool) -> None:
        """Say whether requests may come: only then the server's health is looked at.

        Raises:
            RuntimeError: memory that it needs to generate is released.
        """
        released = self.current.released
        if generating and released:
            raise RuntimeError(
                f"{self._name} is to generate, and its {', '.join(sorted(released))} are released."
            )
        if generating:
            self._generating.set()
        else:
            self._generating.clear()

    def start_anew(self) -> None:
        """End a server that has answered and lives, and start the next one in its place.

        One that is dead, or was only just started, is left to `watch`: it is in nobody's broadcast.
        """
        with self._restarting:
            current = self.current
            if current.ready and current.server.alive and not self._stopping.is_set():
                self._replace(current, "waits for another that is gone")

    def stop(self) -> None:
        """End the server with all that it started."""
        self._stopping.set()
        with self._restarting:
            self.current.server.stop()

    def _restart(self, last: Incarnation, *, hangs: bool) -> None:
        """Start the server anew in the place of `last`, unless somebody has done so or all is to end."""
        with self._restarting:
            if self.current is last and not self._stopping.is_set():
                self._replace(last, "hangs" if hangs else f"ended with exit status {last.server.returncode}")

    def _replace(self, last: Incarnation, how: str) -> None:
        limit = self._limits.restarts
        if last.number >= limit or not (last.ready or last.number):
            self._lost.set()
            raise RuntimeError(
                f"the student's engine at {last.server.url} {how}"
                + (f" after {last.number} restarts (--engine-restarts {limit})" if last.number else "")
                + f". The end of its log, {last.server.log_path}:\n{last.server.log_tail()}"
            )
        last.server.stop()
        sys.stdout.write(
            f"{self._name} at {last.server.url} {how} in the middle of the run; restart {last.number + 1} of "
            f"{limit}. The end of its log, {last.server.log_path}:\n{last.server.log_tail(5)}\n"
        )
        sys.stdout.flush()
        if not self._stopping.is_set():  # it may have taken a while to end
            self.current = Incarnation(self._launch(), last.number + 1)

    def _healthy(self, server: ServerProcess) -> bool:
        from slime.engines.process import is_ready

        return is_ready(server.url, self._limits.check_timeout, path="/health")
