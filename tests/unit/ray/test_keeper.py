"""When a server is started anew, and when nobody goes on without it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from slime.ray import keeper as module
from slime.ray.keeper import FAILED_CHECKS, Keeper, Limits
from tests.fakes.processes import wait_until
from tests.fakes.serving import in_thread


@dataclass
class _Server:
    """A server process that lives and dies as a test wants."""

    url: str = "http://127.0.0.1:1"
    alive: bool = True
    starts: bool = True
    stopped: int = 0
    log_path: Path = field(default=Path("engine_0.log"))

    @property
    def returncode(self) -> int | None:
        return None if self.alive else 137

    def wait_ready(self, timeout: float) -> None:
        if not (self.alive and self.starts):
            raise RuntimeError(f"not ready within {timeout:g} s")

    def log_tail(self, lines: int = 40) -> str:
        return "its last words"

    def stop(self) -> None:
        self.stopped += 1


class _Launches:
    """Launches one server after the other, all at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.servers: list[_Server] = []

    def __call__(self) -> Any:
        self.servers.append(_Server(self.url))
        return self.servers[-1]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)


@contextmanager
def watched(keeper: Keeper) -> Iterator[list[BaseException]]:
    """Let it watch beside the block; give what that ended with."""
    failures: list[BaseException] = []

    def watch() -> None:
        try:
            keeper.watch()
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield failures
    finally:
        keeper.stop()
        thread.join(60)
        assert not thread.is_alive()


def make(
    url: str = "http://127.0.0.1:1", *, restarts: int = 2, check_timeout: float = 60
) -> tuple[Keeper, list[_Server]]:
    launches = _Launches(url)
    limits = Limits(restarts=restarts, start_timeout=60, check_interval=0, check_timeout=check_timeout)
    return Keeper("engine_0", cast(Any, launches), limits), launches.servers


def test_a_dead_server_is_started_anew_until_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    keeper, servers = make(restarts=2)
    with watched(keeper) as failures:
        for number in (0, 1, 2):
            assert keeper.wait_ready().number == number
            servers[number].alive = False
            if number < 2:
                wait_until(lambda number=number: len(servers) == number + 2, "not started anew")
        wait_until(lambda: failures, "it goes on for ever")
        with pytest.raises(RuntimeError, match="not ready"):
            keeper.wait_ready()
    assert len(servers) == 3
    assert [server.stopped for server in servers] == [1, 1, 1]
    message = str(failures[0])
    assert "ended with exit status 137 after 2 restarts (--engine-restarts 2)" in message
    assert message.endswith("its last words")
    console = capsys.readouterr().out
    assert "restart 1 of 2" in console
    assert "restart 2 of 2" in console


def test_who_waits_for_a_dead_server_gets_the_next_one() -> None:
    keeper, servers = make()
    keeper.wait_ready()
    servers[0].alive = False
    with watched(keeper):
        assert keeper.wait_ready().number == 1


def test_a_server_that_dies_before_it_ever_answered_is_not_tried_again() -> None:
    keeper, servers = make()
    servers[0].alive = False
    with pytest.raises(RuntimeError, match="not ready within 60 s"):
        keeper.wait_ready()
    with watched(keeper) as failures:
        wait_until(lambda: failures, "it is tried again")
    assert len(servers) == 1
    assert "ended with exit status 137. The end of its log" in str(failures[0])


def test_one_that_lives_and_does_not_come_up_is_an_error() -> None:
    keeper, servers = make()
    servers[0].starts = False
    with pytest.raises(RuntimeError, match="not ready within 60 s"):
        keeper.wait_ready()
    assert len(servers) == 1


@dataclass
class _Health:
    """What is asked of a server's health, and whether it answers."""

    asked: int = 0
    answers: Callable[[int], bool] = lambda asked: False

    async def answer(self, request: web.Request) -> web.Response:
        assert request.path == "/health"
        self.asked += 1
        return web.Response(status=200 if self.answers(self.asked) else 503)


def test_a_hanging_server_is_started_anew_only_while_it_is_to_generate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    health = _Health()
    with in_thread(health.answer) as url:
        keeper, servers = make(url)
        keeper.wait_ready()
        with watched(keeper):
            threading.Event().wait(0.2)
            assert (health.asked, len(servers)) == (0, 1)
            keeper.set_generating(True)
            wait_until(lambda: len(servers) == 2, "the hang is not noticed")
            asked = health.asked
            keeper.set_generating(False)
    assert servers[0].stopped == 1
    assert asked == FAILED_CHECKS  # the new one is not asked before it is known to be ready
    assert "hangs in the middle of the run" in capsys.readouterr().out


async def _never(request: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    return web.Response()


def test_one_that_leaves_the_question_open_hangs() -> None:
    with in_thread(_never) as url:
        keeper, servers = make(url, check_timeout=0.05)
        keeper.wait_ready()
        keeper.set_generating(True)
        with watched(keeper):
            wait_until(lambda: len(servers) == 2, "the hang is not noticed")
    assert servers[0].stopped == 1


def test_a_check_now_and_then_that_fails_is_no_hang() -> None:
    health = _Health(answers=lambda asked: asked % FAILED_CHECKS == 0)
    with in_thread(health.answer) as url:
        keeper, servers = make(url)
        keeper.wait_ready()
        keeper.set_generating(True)
        with watched(keeper):
            wait_until(lambda: health.asked > 4 * FAILED_CHECKS, "its health is not asked for")
        assert len(servers) == 1


def test_while_memory_is_released_nobody_starts_a_server_or_lets_it_generate() -> None:
    keeper, servers = make()
    keeper.wait_ready().released.update({"weights", "kv_cache"})
    with pytest.raises(RuntimeError, match="engine_0 is to generate, and its kv_cache, weights are released"):
        keeper.set_generating(True)
    servers[0].starts = False  # it answers nobody, and is there
    assert keeper.wait_ready().number == 0
    servers[0].alive = False
    with watched(keeper):
        threading.Event().wait(0.2)
        assert len(servers) == 1
        anew = keeper.wait_ready()  # whose turn it is asks for it
    assert (anew.number, anew.released) == (1, set())
    keeper.set_generating(True)


def test_one_that_lives_is_started_anew_when_it_waits_for_another_that_is_gone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    keeper, servers = make(restarts=1)
    keeper.wait_ready()
    with watched(keeper):
        keeper.start_anew()
        assert keeper.wait_ready().number == 1
        assert servers[0].stopped == 1
        with pytest.raises(RuntimeError, match=r"after 1 restarts \(--engine-restarts 1\)"):
            keeper.start_anew()
    assert "waits for another that is gone" in capsys.readouterr().out


def test_one_that_has_just_been_started_anew_is_not_replaced_a_second_time() -> None:
    """The dead one of two costs one restart, not two."""
    keeper, servers = make(restarts=1)
    keeper.wait_ready()
    servers[0].alive = False
    keeper.start_anew()
    assert len(servers) == 1  # `watch` will see to it
    with watched(keeper) as failures:
        wait_until(lambda: len(servers) == 2, "not started anew")
        keeper.start_anew()
        assert keeper.wait_ready().number == 1
    assert len(servers) == 2
    assert failures == []


def test_one_that_was_ready_is_not_asked_again_while_it_lives() -> None:
    """Paused, it would say that it is not."""
    keeper, servers = make()
    keeper.wait_ready()
    servers[0].starts = False
    assert keeper.wait_ready().number == 0


def test_nothing_is_started_once_the_run_ends() -> None:
    keeper, servers = make()
    keeper.wait_ready()
    keeper.stop()
    servers[0].alive = False
    keeper.watch()
    assert len(servers) == 1
