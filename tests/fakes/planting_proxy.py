"""A proxy in front of a real engine that plants one fault: all it does not spoil is a real answer.

A fault is a subclass of `Fault` with what it changes: the page of a GET, the request on its way in, the
answer on its way out. Runs in a thread of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web

from tests.fakes.serving import in_thread

Json = dict[str, Any]


class Fault:
    """No fault: everything passes through."""

    key: str | None = None
    """The key that the proxy demands."""

    def page(self, path: str, page: Json) -> Json:
        """Change the answer to a GET."""
        return page

    def request(self, body: Json) -> Json:
        """Change the body of a request to `/generate`."""
        return body

    def answer(self, body: Json, answer: Json) -> Json:
        """Change the answer to it; `body` is as it was sent."""
        return answer

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        """Answer in the engine's place; `body` is None for a GET."""
        return None


class Proxy:
    """Forwards to `target`, spoiled by `fault`."""

    def __init__(self, target: str, fault: Fault) -> None:
        self.target = target
        self.fault = fault
        self._session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Forward one request."""
        raw = await request.read()
        body = json.loads(raw) if raw else None
        given = request.headers.get("Authorization", "")
        if (
            self.fault.key
            and given != f"Bearer {self.fault.key}"
            and request.path not in ("/ready", "/health")
        ):
            return web.json_response({"error": "Unauthorized"}, status=401)
        instead = await self.fault.instead(request, body)
        if instead is not None:
            return instead
        sent = body if body is None else self.fault.request(dict(body))
        status, text = await self._forward(request.method, request.path, sent)
        if status != 200 or not text.startswith("{"):
            kind = "application/json" if text.startswith("{") else "text/plain"
            return web.Response(status=status, text=text, content_type=kind)
        answer = json.loads(text)
        if body is not None:
            answer["meta_info"]["id"] = body.get("rid", answer["meta_info"]["id"])
            answer = self.fault.answer(body, answer)
        else:
            answer = self.fault.page(request.path, answer)
        # NaN, where it is planted, goes out as Python's json writes it
        return web.Response(text=json.dumps(answer), content_type="application/json")

    async def _forward(self, method: str, path: str, body: Json | None) -> tuple[int, str]:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        async with self._session.request(method, self.target + path, data=data, headers=headers) as answer:
            return answer.status, await answer.text()

    async def close(self) -> None:
        """Close the connections to the engine."""
        if self._session is not None:
            await self._session.close()


@contextmanager
def planted(target: str, fault: Fault) -> Iterator[str]:
    """Serve on a free port of the loopback until the block ends; give the proxy's URL."""
    proxy = Proxy(target, fault)
    with in_thread(proxy.handle, at_end=proxy.close) as url:
        yield url
