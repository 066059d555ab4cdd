"""A tiny main job for the end-to-end tests: a little data, a teacher, the driver, and what it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from slime.engines.process import PROJECT_ROOT, ServerProcess, free_port, start_server
from slime.tiny.geometry import GEOMETRY
from slime.tiny.paths import checkpoint_path
from slime.tiny.problems import ProblemSet
from tests.fakes.launcher import SCRIPT

MARK = "SLIME_TEST_JOB"
START_SECONDS = 480.0
SHARED_FOLDERS = (Path("/dev/shm"), Path(tempfile.gettempdir()))


def write_data(
    folder: Path, train_rows: int = 8, test_rows: int = 24, problems: ProblemSet = GEOMETRY
) -> dict[str, Path]:
    """Write the first rows of a tiny set."""
    paths, whole = {}, problems.write_splits(folder / "whole")
    for split, rows in (("train", train_rows), ("test", test_rows)):
        paths[split] = folder / f"{split}.parquet"
        pq.write_table(pq.read_table(whole[split]).slice(0, rows), paths[split])
    return paths


def start_teacher(log_path: Path, *flags: str) -> ServerProcess:
    """Start the tiny teacher, with more flags, and wait for it."""
    server = start_server(
        "transformers",
        str(checkpoint_path("teacher")),
        free_port(),
        log_path,
        role="teacher",
        extra_args=flags,
    )
    server.wait_ready(START_SECONDS)
    return server


@dataclass
class Job:
    """One driver, or launcher with its driver, in a process group of its own as a terminal starts it."""

    process: subprocess.Popen[str]
    output_dir: Path
    console_path: Path
    mark: str
    driver_pid: int

    @property
    def console(self) -> str:
        """What the job has printed."""
        return self.console_path.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = START_SECONDS) -> None:
        """Return once the console shows `pattern`."""
        self.wait_until(lambda: re.search(pattern, self.console) is not None, f"no {pattern!r}", seconds)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Return once `condition` holds; fail with the console where it does not, or the job has ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll() is not None
            assert not ended, f"{what}; the job ended:\n{self.console}"
            assert time.monotonic() < deadline, f"{what} after {seconds} s:\n{self.console}"
            time.sleep(0.1)

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Return the job's exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.console}") from None

    def interrupt(self) -> None:
        """Send SIGINT to the whole process group, as Ctrl-C does."""
        os.killpg(self.process.pid, signal.SIGINT)

    def processes(self) -> list[psutil.Process]:
        """Return every living process of the job, however indirectly started; it inherited our mark."""
        return [process for process in psutil.process_iter() if _mark(process) == self.mark]

    def find_all(self, pattern: str) -> list[psutil.Process]:
        """Return the job's processes whose command lines show `pattern`."""
        return [process for process in self.processes() if re.search(pattern, command_line(process))]

    def find(self, pattern: str) -> psutil.Process:
        """Return the job's one process whose command line shows `pattern`.

        A copy that is about to be another program shows it too for a moment; that is waited for.
        """
        self.wait_until(lambda: len(self.find_all(pattern)) == 1, f"not one process matches {pattern!r}")
        return self.find_all(pattern)[0]

    def assert_nothing_left(self, seconds: float = 120.0) -> None:
        """Fail if a process, a folder of Ray's or published weights outlive the job by `seconds`."""
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, [command_line(process)[:120] for process in left]
            time.sleep(0.1)
        assert self.shared_folders() == []

    def shared_folders(self) -> list[Path]:
        """Return the driver's own folders in shared memory and the temporary folder."""
        names = (f"slime-weights-{self.driver_pid}-*", f"slime-ray-{self.driver_pid}-*")
        return [path for folder in SHARED_FOLDERS for name in names for path in folder.glob(name)]


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def command_line(process: psutil.Process) -> str:
    """Return a process's command line, nothing where it has just ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def arguments(data: dict[str, Path], teacher_url: str, output_dir: Path, *extra: str) -> list[str]:
    """Return the flags of a small job: 2 rollouts of 4 prompts by 2 answers."""
    return [
        *("--hf-checkpoint", str(checkpoint_path("student")), "--engine", "transformers"),
        *("--prompt-data", str(data["train"]), "--apply-chat-template", "--rollout-shuffle"),
        *("--num-rollout", "2", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"),
        *("--rollout-max-response-len", "64", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096"),
        *("--rm-type", "math", "--rm-url", f"{teacher_url}/generate", "--use-opd", "--opd-type", "sglang"),
        *("--custom-rm-path", "examples.opd_vlm.opd_vlm_reward.reward_func"),
        *("--custom-reward-post-process-path", "examples.opd_vlm.opd_vlm_reward.post_process_rewards"),
        *("--lr", "3e-4", "--train-threads", "1", "--eval-prompt-data", "tiny", str(data["test"])),
        *("--output-dir", str(output_dir), *extra),
    ]


@contextmanager
def running(argv: list[str], output_dir: Path, variables: Mapping[str, str] | None = None) -> Iterator[Job]:
    """Start the driver; kill whatever a failed test leaves of it."""
    command = [sys.executable, "-m", "slime.train", *argv]
    with _started(command, output_dir, dict(variables or {})) as job:
        yield job


@contextmanager
def launched(output_dir: Path, data: Path, knobs: Mapping[str, str], script: Path = SCRIPT) -> Iterator[Job]:
    """Start a launcher on as small a job, with `SLIME_SCRIPT_<knob>` set; teacher and driver are real."""
    knobs = {
        "SKIP_SETUP": "1",
        "DATASET_NAME": str(data),
        "OUTPUT_DIR": str(output_dir),
        "ROLLOUT_BATCH_SIZE": "4",
        "N_SAMPLES_PER_PROMPT": "2",
        "MAX_RESPONSE_LEN": "64",
        **knobs,
    }
    variables = {f"SLIME_SCRIPT_{name}": value for name, value in knobs.items()}
    variables |= {"VIRTUAL_ENV": sys.prefix, "TMPDIR": str(output_dir.parent)}
    with _started(["bash", str(script)], output_dir, variables) as job:
        yield job


@contextmanager
def benchmarking(argv: list[str], output_dir: Path) -> Iterator[Job]:
    """Start the benchmark of learning signals."""
    command = [sys.executable, "-m", "scripts.benchmarks.learning", "--out", str(output_dir), *argv]
    with _started(command, output_dir, {"PYTHONPATH": str(PROJECT_ROOT)}) as job:
        yield job


@contextmanager
def _started(command: list[str], output_dir: Path, variables: dict[str, str]) -> Iterator[Job]:
    mark = uuid.uuid4().hex
    console_path = output_dir.with_suffix(".console")
    console_path.parent.mkdir(parents=True, exist_ok=True)
    with console_path.open("w") as console:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, MARK: mark, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", **variables},
        )
    job = Job(process, output_dir, console_path, mark, process.pid)
    try:
        yield job
    finally:
        for left in job.processes():
            left.kill()
        process.wait()
