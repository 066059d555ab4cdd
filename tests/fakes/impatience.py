"""Time limits of requests that come when a test says so, and not when a busy machine's clock does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from slime.engines.errors import EngineTimeoutError
from slime.engines.transport import Transport


def time_is_out_when(monkeypatch: pytest.MonkeyPatch, hanging: Callable[[], bool]) -> list[str]:
    """Let a request's time be out when its server hangs, and not when a busy machine is late; give the paths
    that were sent to."""
    original, sent = Transport.send, list[str]()

    async def send(
        self: Transport, method: str, url: str, body: dict[str, Any] | None, key: str | None, seconds: float
    ) -> bytes:
        sent.append(urlsplit(url).path)
        answer = asyncio.ensure_future(original(self, method, url, body, key, 600.0))
        while not answer.done():
            if hanging():
                answer.cancel()
                raise EngineTimeoutError(f"{url} gave no answer within {seconds:.0f} s")
            await asyncio.wait([answer], timeout=0.01)
        return answer.result()

    monkeypatch.setattr(Transport, "send", send)
    return sent
