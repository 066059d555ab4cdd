"""Whether ports are free, and whether those answer that must."""

from __future__ import annotations

import os
import socket

import pytest

from slime.preflight import ports
from slime.preflight.ports import check_ports, connect_problem, holder, is_taken
from tests.fakes.launches import launch, teacher

DEAD = 1
"""A port that no program of today listens at."""


def test_a_taken_port_is_told_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert is_taken(port)
        assert connect_problem("127.0.0.1", port) is None
        (finding,) = check_ports(launch(teacher=teacher("teacher", port=port)))
        assert finding.fatal
        assert finding.what.startswith(f"port {port}, where the teacher is to listen, is taken by process ")
        assert f"process {os.getpid()} (" in holder(port)
        assert "SLIME_SCRIPT_TEACHER_PORT" in finding.remedy
    assert list(check_ports(launch())) == []


def test_engines_elsewhere_must_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        urls = (f"http://127.0.0.1:{server.getsockname()[1]}", f"http://user:planted@127.0.0.1:{DEAD}")
        (finding,) = check_ports(launch("--rollout-engine-urls", *urls))
    assert finding.fatal
    assert finding.what.startswith(f"nothing answers at 127.0.0.1:{DEAD} (--rollout-engine-urls): ")
    assert "planted" not in finding.what


def test_a_ray_that_is_joined_must_be_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "RAY_NOTE", tmp_path / "ray_current_cluster")
    (finding,) = check_ports(launch("--ray-address", "auto"))
    assert finding.what == "--ray-address auto finds no Ray cluster on this machine"
    assert "ray start --head" in finding.remedy
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:6379")
    assert list(check_ports(launch("--ray-address", "auto"))) == []
    (finding,) = check_ports(launch("--ray-address", f"127.0.0.1:{DEAD}"))
    assert finding.what.startswith("no Ray answers at --ray-address 127.0.0.1:")
    (finding,) = check_ports(launch("--ray-address", "head"))
    assert "it is not HOST:PORT" in finding.what
    assert list(check_ports(launch("--ray-address", "ray://head:10001"))) == []
