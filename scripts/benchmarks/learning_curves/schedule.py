"""Several runs at a time, each on a worker of its own: who does which run, and what is told of it."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from scripts.benchmarks.learning_curves.methods import Run
from slime.engines.process import PROJECT_ROOT
from slime.ray.interrupts import shielded

STOP_SECONDS = 60.0
"""What a worker may take to end its run and its engine."""
ENVIRONMENT = {
    "PYTHONPATH": str(PROJECT_ROOT),
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    # Threads that wait by spinning take the cores of the processes that they wait for.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}


class Worker:
    """A process with a student engine, which does one run at a time."""

    def __init__(self, number: int, out: Path, data: Path, teacher_url: str) -> None:
        """Start it; it takes orders at once and begins when its engine is ready."""
        logs = out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.log_path = logs / f"worker_{number}.log"
        command = [sys.executable, "-m", "scripts.benchmarks.learning_curves.worker"]
        command += ["--out", str(out), "--data", str(data), "--teacher-url", teacher_url]
        command += ["--log", str(logs / f"engine_{number}.log")]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(os.environ) | ENVIRONMENT,
                # Ctrl-C is ours alone: a worker ends when its input does.
                start_new_session=True,
            )
        self.run: Run | None = None
        """What it is doing."""

    def begin(self, run: Run) -> None:
        """Let it do a run; `done` waits for it."""
        assert self._process.stdin is not None
        self.run = run
        self._process.stdin.write(json.dumps(run.as_dict()).encode() + b"\n")
        self._process.stdin.flush()

    def fileno(self) -> int:
        """Return what becomes readable once a run is over."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def done(self) -> bool:
        """Wait for the run's end; False where the worker has ended instead, its reason in its log."""
        assert self._process.stdout is not None
        self.run = None
        return bool(self._process.stdout.readline())

    def dismiss(self) -> None:
        """Let it end, in the middle of a run too; `stop` waits for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self) -> None:
        """End it with its engine; return when both are gone."""
        assert self._process.stdout is not None
        self.dismiss()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # its engine has a supervisor, which ends it then
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Workers:
    """Up to `jobs` workers, started when they are first needed and ended with the block."""

    def __init__(self, jobs: int, out: Path, data: Path, teacher_url: str) -> None:
        self._jobs = jobs
        self._settings = (out, data, teacher_url)
        self._all: dict[int, Worker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with shielded():
            for worker in self._all.values():
                worker.dismiss()
            for worker in self._all.values():
                worker.stop()

    def do(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Path]]:
        """Do the runs; yield each as it ends, with its worker's log. One that failed has left no result."""
        waiting = list(reversed(runs))
        with selectors.DefaultSelector() as selector:
            for number in range(min(self._jobs, len(runs))):
                self._begin(selector, number, waiting.pop())
            while selector.get_map():
                for key, _ in selector.select():
                    number: int = key.data
                    worker = self._all[number]
                    selector.unregister(worker)
                    run = worker.run
                    assert run is not None
                    if not worker.done():
                        self._all.pop(number).stop()
                    if waiting:
                        self._begin(selector, number, waiting.pop())
                    yield run, worker.log_path

    def _begin(self, selector: selectors.BaseSelector, number: int, run: Run) -> None:
        if number not in self._all:
            self._all[number] = Worker(number, *self._settings)
        self._all[number].begin(run)
        selector.register(self._all[number], selectors.EVENT_READ, number)
