"""Are the ports free that servers will listen at, and do those answer that are there already?"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from slime.preflight.finding import Finding
from slime.preflight.launch import Launch

CHECK = "ports"
LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 3.0
RAY_NOTE = Path("/tmp/ray/ray_current_cluster")
"""Where Ray notes the address of a cluster that was started on this machine."""
DEFAULT_PORTS = {"http": 80, "https": 443}


def check_ports(launch: Launch) -> Iterator[Finding]:
    """Try the teacher's port, the student's engines elsewhere and the Ray that is joined."""
    if launch.teacher is not None and is_taken(launch.teacher.port):
        port = launch.teacher.port
        yield Finding(
            check=CHECK,
            what=f"port {port}, where the teacher is to listen, is taken by {holder(port)}",
            remedy="end what uses it, or choose another by SLIME_SCRIPT_TEACHER_PORT",
        )
    yield from _engines(launch.args.rollout_engine_urls)
    yield from _ray(launch.args.ray_address)


def is_taken(port: int) -> bool:
    """Tell whether a server could not listen there."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: what has just ended is no bar
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return True
    return False


def holder(port: int) -> str:
    """Say who listens at a port, as far as this user may know."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            here = connection.laddr and connection.laddr.port == port
            if here and connection.status == psutil.CONN_LISTEN and connection.pid is not None:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another user's process"


def _engines(urls: tuple[str, ...]) -> Iterator[Finding]:
    with ThreadPoolExecutor(max_workers=max(1, len(urls))) as pool:
        problems = pool.map(_unreachable, urls)
        for url, problem in zip(urls, problems, strict=True):
            if problem is not None:
                parts = urlsplit(url)
                yield Finding(
                    check=CHECK,
                    what=f"nothing answers at {parts.hostname}:{_port(url)} (--rollout-engine-urls): "
                    f"{problem}",
                    remedy="start the engine first, or correct the address",
                )


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or DEFAULT_PORTS[parts.scheme]


def _unreachable(url: str) -> str | None:
    return connect_problem(urlsplit(url).hostname or "", _port(url))


def connect_problem(host: str, port: int) -> str | None:
    """Say why nothing answers at an address; None where something does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


def _ray(address: str | None) -> Iterator[Finding]:
    remedy = "start one by `ray start --head`, or let the run have its own (SLIME_SCRIPT_EXTERNAL_RAY=0)"
    if address == "auto" and not RAY_NOTE.exists():
        yield Finding(
            check=CHECK, what="--ray-address auto finds no Ray cluster on this machine", remedy=remedy
        )
    elif address is not None and address != "auto" and "://" not in address:
        host, _, port = address.rpartition(":")
        problem = connect_problem(host, int(port)) if port.isdigit() else "it is not HOST:PORT"
        if problem is not None:
            yield Finding(
                check=CHECK, what=f"no Ray answers at --ray-address {address}: {problem}", remedy=remedy
            )
