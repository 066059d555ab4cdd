"""One of the benchmark's workers: a student engine, and one run after another on it.

Reads a run a line as JSON and answers with its name once `result.json` is written; when the input ends, so
does the worker, in the middle of a run too. `schedule.py` starts it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from scripts.benchmarks.learning_curves.local_run import Setting, measure_teacher, run_locally
from scripts.benchmarks.learning_curves.methods import Run
from scripts.benchmarks.learning_curves.results import RESULT_FILE, run_folder
from slime.engines.process import free_port, start_server
from slime.ray.interrupts import ignore, listen
from slime.tiny.paths import checkpoint_path, ensure_dataset

START_SECONDS = 300.0


def own_stdout() -> TextIO:
    """Return the standard output for answers alone: whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def read_orders(orders: queue.SimpleQueue[Run]) -> None:
    """Put what is read into the queue; at the end of the input, interrupt the main thread."""
    for line in sys.stdin:
        orders.put(Run.from_dict(json.loads(line)))
    os.kill(os.getpid(), signal.SIGTERM)


class Work:
    """The runs on one engine."""

    def __init__(self, out: Path, setting: Setting) -> None:
        self._out = out
        self._setting = setting
        self._teacher_accuracy: float | None = None

    def do(self, run: Run) -> None:
        """Do one run in a fresh folder; its result is written last, and whole."""
        folder = run_folder(self._out, run)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self._teacher_accuracy is None:
            self._teacher_accuracy = self._warm_up(run)
        with (folder / "console.log").open("w", buffering=1, encoding="utf-8") as console:
            result = run_locally(run, self._setting, self._teacher_accuracy, folder, console)
        partial = folder / f".{RESULT_FILE}.partial"
        partial.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
        partial.rename(folder / RESULT_FILE)

    def _warm_up(self, run: Run) -> float:
        """Run one rollout that does not count, and return the teacher's accuracy.

        First calls into torch take seconds, which would be counted against the first run.
        """
        short = replace(run, case=replace(run.case, num_rollout=1))
        with tempfile.TemporaryDirectory() as scratch:
            accuracy = measure_teacher(short, self._setting, Path(scratch))
            run_locally(short, self._setting, accuracy, Path(scratch), sys.stderr)
        # What the imports brought stays; out of the collector's sight it does not stop the rollout's loop.
        gc.collect()
        gc.freeze()
        return accuracy


def serve(options: argparse.Namespace, answers: TextIO) -> None:
    """Take orders for ever; KeyboardInterrupt ends it."""
    orders: queue.SimpleQueue[Run] = queue.SimpleQueue()
    threading.Thread(target=read_orders, args=[orders], daemon=True).start()
    # The students of all cases have one architecture, and every run begins by publishing its weights.
    engine = start_server(
        "transformers", str(checkpoint_path("student")), free_port(), options.log, dtype="float32"
    )
    with engine:
        engine.wait_ready(START_SECONDS)
        setting = Setting(
            data=ensure_dataset(options.data), teacher_url=options.teacher_url, engine_url=engine.url
        )
        work = Work(options.out, setting)
        while True:
            run = orders.get()
            work.do(run)
            answers.write(f"{run.name}\n")
            answers.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="One worker of the learning benchmark.")
    parser.add_argument("--out", type=Path, required=True, help="the benchmark's output folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tiny geometry set")
    parser.add_argument("--teacher-url", required=True)
    parser.add_argument("--log", type=Path, required=True, help="log of the student engine")
    options = parser.parse_args()
    answers = own_stdout()
    listen()
    # Guards the control endpoints of this worker's engine, and of no other's.
    os.environ["SLIME_ENGINE_ADMIN_KEY"] = secrets.token_hex(16)
    try:
        serve(options, answers)
    except KeyboardInterrupt:
        ignore()
    return 0


if __name__ == "__main__":
    sys.exit(main())
