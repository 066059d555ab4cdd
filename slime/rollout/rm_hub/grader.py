"""A pool of worker processes that compare answers by `math-verify`, each under a wall limit kept from
outside.

A worker that is over the limit, runs out of memory, says something else than a verdict, or dies, is killed
and replaced; its answer counts as wrong and is counted.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

WALL_SECONDS = 2.0
"""Limit of one comparison."""
START_SECONDS = 60.0
"""Limit of a worker's start: importing sympy takes a second or two, more on a busy machine."""

VERDICTS: dict[bytes | None, bool] = {b"true": True, b"false": False}
"""What a worker may say."""
SECRETS = ("KEY", "TOKEN", "PASSWORD", "SECRET")
"""How the names of variables end that a process which reads foreign text has no use for."""

_WORKER_FILE = Path(__file__).with_name("grader_worker.py")


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.upper().endswith(SECRETS)}


class _Worker:
    """One long-lived process. Used by one thread at a time."""

    def __init__(self) -> None:
        # -P: the folder of the worker file must not come before the installed packages on the search path
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_without_secrets(os.environ),
            bufsize=0,
            start_new_session=True,
        )
        self._buffer = b""

    def started(self) -> bool:
        """Wait until the worker has loaded its library."""
        return self._read_line(START_SECONDS) is not None

    def ask(self, answer: str, label: str, wall_seconds: float) -> bool | None:
        """Return the verdict; None where the worker is over a limit, dead, or has none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([answer, label]).encode() + b"\n")
        except BrokenPipeError:
            return None
        return VERDICTS.get(self._read_line(wall_seconds))

    def kill(self) -> None:
        """End the process and reap it."""
        self._process.kill()
        self._process.communicate()

    def _read_line(self, seconds: float) -> bytes | None:
        assert self._process.stdout is not None
        give_up = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            readable, _, _ = select.select(
                [self._process.stdout], [], [], max(0.0, give_up - time.monotonic())
            )
            chunk = os.read(self._process.stdout.fileno(), 4096) if readable else b""
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


class Grader:
    """Compares answers in up to `size` worker processes, started when first needed."""

    def __init__(self, size: int, wall_seconds: float = WALL_SECONDS) -> None:
        self.timeouts = 0
        """Comparisons given up: over the wall or the memory limit, or their worker died."""
        self._wall_seconds = wall_seconds
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="grader")
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()

    def submit(self, answer: str, label: str) -> Future[bool]:
        """Compare in the background; the future is False where the comparison was given up."""
        return self._threads.submit(self._compare, answer, label)

    def close(self) -> None:
        """End the workers and wait for them."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()

    def _compare(self, answer: str, label: str) -> bool:
        """Ask this thread's worker."""
        worker = self._worker()
        verdict = worker.ask(answer, label, self._wall_seconds)
        if verdict is not None:
            return verdict
        self._discard(worker)
        with self._lock:
            self.timeouts += 1
        return False

    def _worker(self) -> _Worker:
        worker = vars(self._own).get("worker")
        if worker is None:
            worker = _Worker()
            with self._lock:
                self._workers.add(worker)
            if not worker.started():
                self._discard(worker)
                raise RuntimeError(
                    f"a grader process did not start within {START_SECONDS:.0f} s; run `{sys.executable} -P "
                    f"{_WORKER_FILE}` to see why (is math-verify installed?)."
                )
            self._own.worker = worker
        return worker

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._own.worker = None
        with self._lock:
            self._workers.discard(worker)


@lru_cache(maxsize=1)
def shared_grader() -> Grader:
    """Return this process's grader: one worker per core, ended with the process."""
    grader = Grader(size=len(os.sched_getaffinity(0)))
    atexit.register(grader.close)
    return grader
