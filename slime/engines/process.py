"""Server processes that end with their owner.

Ray's engine actors, the tests and the launcher start every engine through here. Each server runs under a
small supervisor (`supervisor.py`) that ends it, with everything it started, once this process stops it or
dies in any way, `kill -9` included. What a server is asked, and what it answers, is `client.py`'s business.
"""

import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from slime.engines.sglang_engine import (
    CPU_GRACE_SECONDS,
    GPU_GRACE_SECONDS,
    Role,
    require_sglang,
    sglang_command,
)
from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE

EngineKind = Literal["sglang", "transformers"]
LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 10.0
READY_POLL_SECONDS = 0.2
SUPERVISOR = Path(__file__).with_name("supervisor.py")
PROJECT_ROOT = Path(__file__).parents[2]
_port_holders: list[socket.socket] = []
"""Bound to the ports that `free_port` gave, never listening."""


def free_port(host: str = LOOPBACK) -> int:
    """Return a TCP port of one of this machine's addresses, free for a server that we start there.

    The system gives it to nobody else as long as this process lives: a server takes seconds to begin to
    listen, and until then the next who asks for any port could be given the same one.
    """
    holder = socket.socket()
    holder.bind((host, 0))
    # Beside a socket that does not listen, one that says the same may listen; every server does say it.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _port_holders.append(holder)
    return holder.getsockname()[1]


class ServerProcess:
    """One running server: its address, its log, and the means to wait for it and to end it.

    Use it as a context manager, or call `stop()`; an owner that does neither still takes its servers with it.
    """

    def __init__(
        self, supervisor: subprocess.Popen[bytes], pid: int, url: str, log_path: Path, admin_key: str | None
    ):
        self._supervisor = supervisor
        self.pid = pid
        self.url = url
        self.log_path = log_path
        self.admin_key = admin_key

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        url: str,
        log_path: str | Path,
        env: Mapping[str, str] | None = None,
        admin_key: str | None = None,
        grace: float = GRACE_SECONDS,
    ) -> Self:
        """Start `command` with exactly the environment `env` (None: ours), its output appended to `log_path`.

        `grace` is the seconds it has after SIGTERM. Raise RuntimeError if `url`'s port is taken or nothing
        can start.
        """
        _refuse_taken_port(url)
        log_path = Path(log_path)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        order = {
            "argv": list(command),
            "env": dict(os.environ if env is None else env),
            "log_path": str(log_path),
            "grace": grace,
            "owner_pid": os.getpid(),
        }
        with open(log_path, "ab") as log:
            # -P: the folder of this file holds modules whose names must not hide those of the standard
            # library.
            supervisor = subprocess.Popen(
                [sys.executable, "-P", str(SUPERVISOR)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        supervisor.stdin.write(json.dumps(order).encode() + b"\n")
        supervisor.stdin.flush()
        report = json.loads(supervisor.stdout.readline() or b"{}")
        if "pid" not in report:
            supervisor.stdin.close()
            supervisor.wait()
            reason = report.get("error", f"its supervisor ended; see {log_path}")
            raise RuntimeError(f"cannot start the server `{command[0]}`: {reason}")
        return cls(supervisor, report["pid"], url, log_path, admin_key)

    @property
    def alive(self) -> bool:
        """Tell whether the server still runs."""
        return self._supervisor.poll() is None

    @property
    def returncode(self) -> int | None:
        """The server's exit status (128 + n for signal n), None while it runs, 0 when `stop()` ended it."""
        return self._supervisor.poll()

    def log_tail(self, lines: int = 40) -> str:
        """Return the last `lines` lines of the server's log."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def wait_ready(self, timeout: float) -> None:
        """Return once `GET /ready` answers 200; raise RuntimeError, with its log's tail, if it cannot."""
        deadline = time.monotonic() + timeout
        while True:
            if not self.alive:
                raise RuntimeError(self._failure(f"ended with status {self.returncode} before it was ready"))
            if is_ready(self.url):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(self._failure(f"was not ready after {timeout:g} s"))
            time.sleep(READY_POLL_SECONDS)

    def stop(self) -> None:
        """End the server and everything it started; return when all of it is gone. May be called again."""
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                pipe.close()
        # A forked child of ours may still hold the pipe, so it is also told.
        self._supervisor.terminate()
        self._supervisor.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _failure(self, what: str) -> str:
        return f"the server at {self.url} {what}. The end of its log, {self.log_path}:\n{self.log_tail()}"


def is_ready(url: str, timeout: float = 5.0, path: str = "/ready") -> bool:
    """Tell whether `url` answers `GET <path>` with 200 within `timeout` seconds; proxies are not used."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or LOOPBACK, parts.port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start_server(
    engine: EngineKind,
    model_path: str,
    port: int,
    log_path: str | Path,
    *,
    host: str = LOOPBACK,
    tp: int = 1,
    gpus: Sequence[int] | None = None,
    dtype: str | None = None,
    threads: int = 1,
    extra_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    role: Role = "student",
) -> ServerProcess:
    """Start an engine and return at once; `wait_ready()` waits for it.

    Beyond loopback, `host` needs SLIME_ENGINE_API_KEY in the environment. `gpus` None is the CPU with
    `threads` threads; `env` is added to our own environment. The control endpoints' key is
    SLIME_ENGINE_ADMIN_KEY from there, or a new random one; either way it is the result's `admin_key`. Raise
    ValueError for arguments that contradict each other and RuntimeError if the engine is not installed or the
    port is taken.
    """
    base = {**os.environ, **(env or {})}
    base.setdefault(ADMIN_KEY_VARIABLE, secrets.token_hex(16))
    grace = GRACE_SECONDS
    if engine == "sglang":
        require_sglang(base, on_cpu=gpus is None)
        command, full_env = sglang_command(
            model_path,
            port,
            role=role,
            gpus=gpus,
            tp=tp,
            dtype=dtype,
            host=host,
            threads=threads,
            extra_args=extra_args,
            env=base,
        )
        grace = CPU_GRACE_SECONDS if gpus is None else GPU_GRACE_SECONDS
    else:
        command, full_env = transformers_command(
            model_path,
            port,
            host=host,
            gpus=gpus,
            tp=tp,
            dtype=dtype,
            threads=threads,
            extra_args=extra_args,
            env=base,
        )
    url = f"http://{host}:{port}"
    return ServerProcess.start(
        command, url=url, log_path=log_path, env=full_env, admin_key=base[ADMIN_KEY_VARIABLE], grace=grace
    )


def transformers_command(
    model_path: str,
    port: int,
    *,
    host: str = LOOPBACK,
    gpus: Sequence[int] | None,
    tp: int,
    dtype: str | None,
    threads: int,
    extra_args: Sequence[str],
    env: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment of a transformers engine, which uses one GPU or the CPU.

    Raise ValueError when it is given more than one GPU.
    """
    if tp != 1 or (gpus is not None and len(gpus) != 1):
        raise ValueError(
            f"the transformers engine runs on one GPU or the CPU, not on GPUs {gpus} with --tp {tp}; "
            "use the SGLang engine, or one engine per GPU (--rollout-num-gpus-per-engine 1)."
        )
    command = [sys.executable, "-m", "slime.engines.transformers_engine"]
    command += ["--model-path", model_path, "--host", host, "--port", str(port)]
    if dtype is not None:
        command += ["--dtype", dtype]
    full_env = dict(env) | {"CUDA_VISIBLE_DEVICES": "" if gpus is None else str(gpus[0])}
    full_env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PROJECT_ROOT), env.get("PYTHONPATH"))))
    if gpus is None:
        full_env["OMP_NUM_THREADS"] = str(threads)
    return [*command, *extra_args], full_env


def _refuse_taken_port(url: str) -> None:
    """Raise RuntimeError if something listens on `url`'s port: it would answer in the new server's place."""
    parts = urlsplit(url)
    with socket.socket() as probe:
        # As the servers do: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parts.hostname or LOOPBACK, parts.port or 80))
        except OSError as error:
            raise RuntimeError(
                f"cannot start a server on {url}: the port is taken ({error.strerror}); end what uses it or "
                "choose another port."
            ) from error
