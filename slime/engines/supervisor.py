"""Keep one server and everything it starts tied to the life of its owner.

The owner's side is `process.py`. This file is run by path as a process of its own between owner and server,
so it imports nothing of the project; it starts the server in a new session, adopts what the server leaves
behind, and ends all of it when the owner's pipe closes, the owner dies, or a signal arrives. It restarts
nothing.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

import psutil

POLL_SECONDS = 0.5
KILL_SECONDS = 30.0
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """Run one command until it ends by itself or has to be stopped; leave no process of it behind.

    `lifeline` is the reading end of a pipe that only the owner holds open; `owner_pid` is our parent as long
    as the owner lives (a forked copy of the owner may hold the pipe too, so both are watched). Either may be
    None.
    """

    def __init__(self, *, grace: float, lifeline: int | None = None, owner_pid: int | None = None) -> None:
        self.grace = grace
        self.lifeline = lifeline
        self.owner_pid = owner_pid
        self._signal: int | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # Under nohup the hang-up is ignored on purpose. An ignored SIGINT is only bash's habit with
            # background jobs.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._remember_signal)
        signal.signal(signal.SIGCHLD, _only_wake_up)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)

    def start(self, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None = None) -> int:
        """Start the server, output to `output` (None: ours); return its pid. OSError if it cannot run."""
        self._server = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output if output is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        return self._server.pid

    def run(self) -> int:
        """Wait for the server's end or a reason to stop it; return the exit status for our own process."""
        server = self._running()
        while server.poll() is None and not self._must_stop():
            watched = [self._wake_read] if self.lifeline is None else [self._wake_read, self.lifeline]
            readable, _, _ = select.select(watched, [], [], POLL_SECONDS)
            if self._wake_read in readable:
                os.read(self._wake_read, 4096)
            if self.lifeline in readable and not os.read(self.lifeline, 4096):
                break
            self._reap_adopted()
        ended_by_itself = server.poll() is not None
        self.end()
        if self._signal is not None:
            return 128 + self._signal
        if not ended_by_itself:
            return 0
        return server.returncode if server.returncode >= 0 else 128 - server.returncode

    def end(self) -> None:
        """Ask the server to end, wait at most `grace` seconds for it, then kill whatever is left of it."""
        server = self._running()
        if server.poll() is None:
            # The head alone: it knows how to end its workers, and one that dies beside it looks like a crash.
            server.terminate()
            try:
                server.wait(self.grace)
            except subprocess.TimeoutExpired:
                sys.stderr.write(f"supervisor: alive {self.grace:g} s after SIGTERM, killing it\n")
        # With its head gone nobody needs the rest, and what ignored SIGTERM would ignore it again.
        deadline = time.monotonic() + KILL_SECONDS
        while left := psutil.Process().children(recursive=True):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {[process.pid for process in left]} outlived SIGKILL")
            for process in left:
                _kill(process)
            server.poll()
            self._reap_adopted()
            time.sleep(0.02)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            raise RuntimeError("the supervisor has started no server yet; call start() first")
        return self._server

    def _must_stop(self) -> bool:
        orphaned = self.owner_pid is not None and os.getppid() != self.owner_pid
        return orphaned or self._signal is not None

    def _reap_adopted(self) -> None:
        """Collect adopted processes that have ended; the server's own status is left for Popen to collect."""
        server = self._running()
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid == server.pid:
                return
            os.waitpid(ended.si_pid, 0)

    def _remember_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number


def _only_wake_up(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: that the signal has a handler makes it write to the wake-up pipe."""


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _prctl(option: int, value: int) -> None:
    """Set a process attribute on Linux; elsewhere there is none, and the pipe and the signals have to do."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def _die_with_parent() -> None:
    """Between fork and exec: have the server killed with its supervisor, should that be killed itself."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Serve one `ServerProcess`: its order comes on stdin as a JSON line, the server's pid goes to stdout."""
    order = json.loads(sys.stdin.buffer.readline())
    supervisor = Supervisor(grace=order["grace"], lifeline=sys.stdin.fileno(), owner_pid=order["owner_pid"])
    with open(order["log_path"], "ab") as log:
        try:
            report: dict[str, int | str] = {"pid": supervisor.start(order["argv"], order["env"], log)}
        except OSError as error:
            report = {"error": str(error)}
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    return 1 if "error" in report else supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
