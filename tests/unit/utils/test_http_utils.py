"""The helper that plugins written for slime import."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from slime.utils import http_utils
from slime.utils.http_utils import post


class Counter:
    """A server that fails as often as it is told."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures = 0
        self.status = 503

    async def answer(self, request: web.Request) -> web.Response:
        self.calls += 1
        if self.calls <= self.failures:
            return web.Response(status=self.status, text="not now")
        return web.json_response({"echo": await request.json(), "key": request.headers.get("Authorization")})

    async def page(self, request: web.Request) -> web.Response:
        return web.Response(text="<html>")


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Counter, str]]:
    async def at_once(seconds: float) -> None:
        """Do not wait between attempts."""

    monkeypatch.setattr(http_utils.asyncio, "sleep", at_once)
    counter = Counter()
    app = web.Application()
    app.router.add_post("/generate", counter.answer)
    app.router.add_post("/page", counter.page)
    server = TestServer(app)
    await server.start_server()
    yield counter, f"http://127.0.0.1:{server.port}"
    await server.close()


async def test_answer_is_the_json_of_the_server(served: tuple[Counter, str]) -> None:
    payload: dict[str, Any] = {"input_ids": [1, 2]}
    answer = await post(served[1] + "/generate", payload, headers={"Authorization": "Bearer k"})
    assert answer == {"echo": payload, "key": "Bearer k"}


async def test_server_errors_are_tried_again(served: tuple[Counter, str]) -> None:
    served[0].failures = 2
    assert (await post(served[1] + "/generate", {}))["echo"] == {}
    assert served[0].calls == 3


async def test_attempts_end_in_the_last_error(served: tuple[Counter, str]) -> None:
    served[0].failures = 99
    with pytest.raises(RuntimeError, match=r"/generate failed after 3 attempts: HTTP 503: not now"):
        await post(served[1] + "/generate", {}, max_retries=2)
    assert served[0].calls == 3


async def test_a_request_that_is_wrong_is_sent_once(served: tuple[Counter, str]) -> None:
    served[0].failures, served[0].status = 99, 400
    with pytest.raises(RuntimeError, match="after 1 attempts: HTTP 400"):
        await post(served[1] + "/generate", {})
    assert served[0].calls == 1


async def test_answer_that_is_no_json_is_an_error(served: tuple[Counter, str]) -> None:
    with pytest.raises(RuntimeError, match="no JSON"):
        await post(served[1] + "/page", {})


async def test_unreachable_server_is_an_error_that_names_it(served: tuple[Counter, str]) -> None:
    with pytest.raises(RuntimeError, match=r"POST http://127.0.0.1:9/ failed after 2 attempts"):
        await post("http://127.0.0.1:9/", {}, max_retries=1)
