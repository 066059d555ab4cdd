"""The tiny main job, started by its launcher again and again in one output folder until it is done."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from slime.engines.process import PROJECT_ROOT, free_port

LAUNCHER = PROJECT_ROOT / "examples" / "opd_vlm" / "run_opd_vlm_geo3k.sh"
MARK = "SLIME_SOAK_JOB"
PROMPTS, SAMPLES = 4, 4
WAIT_SECONDS = 300.0
GONE_SECONDS = 30.0


@dataclass
class Job:
    """One run, however often it is started; its processes are known by a variable that they inherit."""

    folder: Path
    data: Path
    rollouts: int
    save_interval: int
    port: int = field(default_factory=free_port)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the launcher; where the folder holds a checkpoint, it goes on from that."""
        self.starts += 1
        knobs = {
            "SKIP_SETUP": "1",
            "SKIP_DOCTOR": "1",
            "NUM_GPUS": "0",
            "TEACHER_PORT": str(self.port),
            "TEACHER_RESTARTS": "100",
            "DATA_DIR": str(self.data),
            "OUTPUT_DIR": str(self.folder),
            "NUM_ROLLOUT": str(self.rollouts),
            "ROLLOUT_BATCH_SIZE": str(PROMPTS),
            "N_SAMPLES_PER_PROMPT": str(SAMPLES),
            "EVAL_INTERVAL": str(self.rollouts),
            "EXTRA_ARGS": shlex.join(
                [
                    *("--save", str(self.checkpoints), "--save-interval", str(self.save_interval)),
                    *("--engine-restarts", "100", "--train-threads", "1"),
                ]
            ),
        }
        environment = {
            name: text for name, text in os.environ.items() if not name.startswith("SLIME_SCRIPT_")
        }
        environment |= {f"SLIME_SCRIPT_{name}": text for name, text in knobs.items()}
        environment |= {MARK: self.mark, "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
        with self.console.open("a") as console:
            self.process = subprocess.Popen(
                ["bash", str(LAUNCHER)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=environment,
                start_new_session=True,
            )

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.folder / "checkpoints"

    @property
    def console(self) -> Path:
        """The file that gets what all starts print."""
        return self.folder.with_suffix(".console")

    def status(self) -> int | None:
        """Return the launcher's exit status; None while it runs."""
        return None if self.process is None else self.process.poll()

    def processes(self) -> dict[int, psutil.Process]:
        """Return the living processes of the job by their ids."""
        return {process.pid: process for process in psutil.process_iter() if _mark(process) == self.mark}

    def find(self, is_it: Callable[[str], bool]) -> psutil.Process | None:
        """Return a process of the job by its command line; of several, the oldest."""
        found = [process for process in self.processes().values() if is_it(command_line(process))]
        return min(found, key=psutil.Process.create_time, default=None)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Return once `condition` holds.

        Raises:
            RuntimeError: it does not within five minutes; the message ends with what the job printed last.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                end = "\n".join(self.console.read_text(errors="replace").splitlines()[-40:])
                raise RuntimeError(
                    f"{what}: not within {WAIT_SECONDS:g} s. The end of {self.console}:\n{end}"
                )
            time.sleep(0.1)

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.processes().values():
            process.kill()
        if self.process is not None:
            self.process.wait()

    def left(self) -> list[str]:
        """Return the command lines of processes that outlive the job."""
        deadline = time.monotonic() + GONE_SECONDS
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [command_line(process) for process in processes.values()]


def command_line(process: psutil.Process) -> str:
    """Return a process's command line, empty where it has just ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
