"""Server processes: ready, failing, stopped, gone whatever happens to their owner. Every process is real."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from slime.engines import process
from slime.engines.process import ServerProcess, free_port, is_ready, start_server, transformers_command
from tests.fakes.processes import ended

ROOT = Path(__file__).parents[3]

# Answers GET /ready after it has left a child in a session of its own, whose parent is already dead: the kind
# of process that a signal to the server's group does not reach.
SERVER = """
import http.server, os, signal, subprocess, sys
port, pids, stubborn = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "stubborn"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    orphan = subprocess.Popen(["sleep", "600"])
    open(pids, "w").write(f"{os.getppid()} {orphan.pid}")
    os._exit(0)
os.wait()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
    def log_message(self, *args):
        pass
print("listening on", port, flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# Starts a server, says its pids, and waits to be killed. With "forked" a child of it inherits the pipe that
# ties the server to it, and outlives it.
OWNER = """
import os, sys, time
from slime.engines.process import ServerProcess
port, pids, log, forked = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "forked"
command = [sys.executable, "-c", sys.stdin.read(), str(port), pids, "polite"]
server = ServerProcess.start(command, url=f"http://127.0.0.1:{port}", log_path=log)
server.wait_ready(120)
copy = os.fork() if forked else 0
if forked and copy == 0:
    time.sleep(600)
print(server.pid, copy, flush=True)
if sys.argv[5] == "wait":
    time.sleep(600)
"""


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Fail unless `condition` comes true; the limit is far beyond what a loaded machine needs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def gone(*pids: int) -> bool:
    return all(ended(pid) for pid in pids)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def pids(tmp_path: Path) -> Path:
    return tmp_path / "pids"


@pytest.fixture
def start(tmp_path: Path, port: int, pids: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start a command as a server, by default one that is ready at once, and stop it after the test."""
    started: list[ServerProcess] = []

    def start_one(
        *command: str, stubborn: bool = False, grace: float = 5.0, **settings: Any
    ) -> ServerProcess:
        default = (sys.executable, "-c", SERVER, str(port), str(pids), "stubborn" if stubborn else "polite")
        url = f"http://127.0.0.1:{port}"
        log = tmp_path / "logs" / "server.log"
        server = ServerProcess.start(command or default, url=url, log_path=log, grace=grace, **settings)
        started.append(server)
        return server

    yield start_one
    for server in started:
        server.stop()


def test_a_server_becomes_ready_and_stopping_it_takes_its_orphans_along(start, port, pids):
    server = start()
    server.wait_ready(120)
    main, orphan = map(int, pids.read_text().split())

    assert server.pid == main
    assert server.alive
    assert server.returncode is None
    assert "listening on" in server.log_tail()
    assert not gone(orphan)

    server.stop()
    assert not server.alive
    assert gone(main, orphan)
    assert not is_ready(server.url)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    server.stop()


def test_a_server_that_ignores_sigterm_is_killed_after_its_grace_time(start, pids):
    server = start(stubborn=True, grace=0.2)
    server.wait_ready(120)
    server.stop()
    assert gone(*map(int, pids.read_text().split()))
    assert "alive 0.2 s after SIGTERM" in server.log_tail()


def test_a_context_manager_stops_its_server(start, pids):
    with start() as server:
        server.wait_ready(120)
    assert gone(*map(int, pids.read_text().split()))


def test_a_server_that_dies_before_it_is_ready_shows_the_end_of_its_log(start):
    server = start(sys.executable, "-c", "print('no weights here', flush=True); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"ended with status 3 before it was ready(?s:.*)no weights here"):
        server.wait_ready(120)
    assert server.returncode == 3


def test_a_server_killed_by_a_signal_reports_it(start):
    server = start()
    server.wait_ready(120)
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: not server.alive, "the server was killed")
    assert server.returncode == 128 + signal.SIGKILL


def test_a_server_that_is_late_is_an_error_with_its_log(start):
    server = start(sys.executable, "-c", "import time; print('still loading', flush=True); time.sleep(600)")
    eventually(lambda: "still loading" in server.log_tail(), "the server has started")
    with pytest.raises(RuntimeError, match=r"was not ready after 0\.3 s(?s:.*)still loading"):
        server.wait_ready(0.3)
    assert server.alive


def test_what_a_server_leaves_behind_when_it_ends_by_itself_is_ended_too(start, pids):
    server = start()
    server.wait_ready(120)
    main, orphan = map(int, pids.read_text().split())
    os.kill(main, signal.SIGTERM)
    eventually(lambda: not server.alive, "the server was ended")
    assert gone(main, orphan)


def test_a_taken_port_is_refused_before_anything_starts(start, port):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}: the port is taken"):
            start()


def test_a_command_that_does_not_exist_is_an_error_that_names_it(start):
    with pytest.raises(RuntimeError, match="cannot start the server `no-such-engine`"):
        start("no-such-engine")


def test_a_server_gets_exactly_the_environment_it_is_given(start):
    show = "import os; print(sorted(os.environ), flush=True)"
    server = start(sys.executable, "-S", "-c", show, env={"ONLY_THIS": "1"})
    eventually(lambda: not server.alive, "the server has ended")
    names = set(server.log_tail().strip("[]").replace("'", "").split(", "))
    assert "ONLY_THIS" in names
    assert names <= {"ONLY_THIS", "LC_CTYPE"}


@pytest.mark.parametrize("forked", ["alone", "forked"])
def test_a_server_ends_when_its_owner_is_killed_outright(tmp_path, port, pids, forked):
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(port), str(pids), str(tmp_path / "log"), forked, "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        owner.stdin.write(SERVER.encode())
        owner.stdin.close()
        main, copy = map(int, owner.stdout.readline().split())
        _, orphan = map(int, pids.read_text().split())
        owner.kill()
        owner.wait()
        try:
            eventually(lambda: gone(main, orphan), "the server outlived its owner")
        finally:
            if copy:
                os.kill(copy, signal.SIGKILL)


def test_a_server_ends_when_its_owner_forgets_it_and_exits(tmp_path, port, pids):
    arguments = [str(port), str(pids), str(tmp_path / "log"), "alone", "exit"]
    subprocess.run([sys.executable, "-c", OWNER, *arguments], input=SERVER.encode(), cwd=ROOT, check=True)
    server = list(map(int, pids.read_text().split()))
    eventually(lambda: gone(*server), "the server outlived its owner")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_server_ends_when_its_supervisor_is_killed_outright(start):
    server = start()
    server.wait_ready(120)
    os.kill(psutil.Process(server.pid).ppid(), signal.SIGKILL)
    eventually(lambda: gone(server.pid), "the server outlived its supervisor")


def test_a_free_port_is_kept_for_the_server_that_is_to_listen_there():
    given = [free_port() for _ in range(50)]
    assert len(set(given)) == 50
    for port in given:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        assert not is_ready(f"http://127.0.0.1:{port}")
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port))
            server.listen()


def test_the_transformers_engine_runs_on_the_cpu_or_one_gpu():
    settings = {"tp": 1, "dtype": "float32", "threads": 2, "extra_args": ["--seed", "1"]}
    command, env = transformers_command(
        "model", 31000, gpus=None, env={"PYTHONPATH": "elsewhere"}, **settings
    )
    assert command[1:] == [
        *("-m", "slime.engines.transformers_engine", "--model-path", "model", "--host", "127.0.0.1"),
        *("--port", "31000", "--dtype", "float32", "--seed", "1"),
    ]
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["OMP_NUM_THREADS"] == "2"
    assert env["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "elsewhere"]

    _, on_gpu = transformers_command("model", 31000, gpus=[5], env={}, **settings)
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(ValueError, match="one GPU or the CPU, not on GPUs"):
        transformers_command("model", 31000, gpus=[4, 5], env={}, **settings)


def test_start_server_gives_every_server_an_admin_key_and_never_on_the_command_line(monkeypatch, tmp_path):
    orders: list[dict[str, Any]] = []

    class Recorder:
        @staticmethod
        def start(command, **settings):
            orders.append({"command": command, **settings})

    monkeypatch.setattr(process, "ServerProcess", Recorder)
    monkeypatch.delenv("SLIME_ENGINE_ADMIN_KEY", raising=False)
    start_server("transformers", "model", 31000, tmp_path / "log")
    start_server("transformers", "model", 31001, tmp_path / "log")
    start_server("transformers", "model", 31002, tmp_path / "log", env={"SLIME_ENGINE_ADMIN_KEY": "chosen"})

    keys = [order["admin_key"] for order in orders]
    assert len(set(keys)) == 3
    assert keys[2] == "chosen"
    for order in orders:
        assert order["env"]["SLIME_ENGINE_ADMIN_KEY"] == order["admin_key"]
        assert not any(order["admin_key"] in word for word in order["command"])
