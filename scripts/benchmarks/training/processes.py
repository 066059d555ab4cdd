"""Starts a way to train in a process of its own and asks it for steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from scripts.benchmarks.training.report import Record
from scripts.benchmarks.training.workload import Machine, Shape
from slime.engines.process import PROJECT_ROOT


class NoRoomError(RuntimeError):
    """The way does not fit into the GPU's memory."""


class Worker:
    """A way in a process of its own, which takes one optimizer step a turn."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process = process
        self._name = name

    def turn(self) -> Record:
        """Take a step.

        Raises:
            NoRoomError: the GPU has no room for it.
            RuntimeError: the way failed; its own words are on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and may have said why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        while line and not line.startswith("{"):  # a library's word
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self._name} way ended in the middle of a step; see above.")
        record = json.loads(line)
        if "out_of_memory" in record:
            raise NoRoomError(record["out_of_memory"])
        return record


@contextmanager
def worker(name: str, model: Path, shape: Shape, machine: Machine, threads: int) -> Iterator[Worker]:
    """Run one way until the block ends."""
    command = [sys.executable, "-m", "scripts.benchmarks.training.worker", name, "--model", str(model)]
    command += ["--shape", json.dumps(asdict(shape)), "--machine", json.dumps(asdict(machine))]
    command += ["--threads", str(threads)]
    env = dict(os.environ) | {"PYTHONPATH": str(PROJECT_ROOT)}
    # without it a step at the edge of a GPU's memory fails on pieces that no tensor fits into
    env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    ) as process:
        yield Worker(process, name)
