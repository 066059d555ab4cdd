"""Bytes to one server and back: a keep-alive pool, one attempt at a time, failures as typed errors.

Nothing here tries twice (`retry.py` says when to) or knows what a body means (`api.py` does).
"""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson

from slime.engines.errors import (
    AnswerError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    MissingScoreError,
)

KEEP_ALIVE_SECONDS = 4.0
"""Below uvicorn's 5 s: we drop an idle connection before the server closes it under a request."""
CONNECT_SECONDS = 10.0


class Transport:
    """A pool of connections. Belongs to the event loop that first uses it."""

    def __init__(self, role: str, remedy: str) -> None:
        """`role` is what error messages call the server, `remedy` what they tell the user to look at."""
        self._role = role
        self._remedy = remedy
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the pool; the next request opens a new one."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(
        self, method: str, url: str, body: dict[str, Any] | None, key: str | None, seconds: float
    ) -> bytes:
        """Send once and return the whole body of a 200.

        Raises:
            EngineUnreachableError: there was no connection, or it broke.
            EngineTimeoutError: no answer within `seconds`.
            HttpError: an error status.
        """
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else orjson.dumps(body)
        limits = aiohttp.ClientTimeout(total=max(seconds, 0.001), sock_connect=CONNECT_SECONDS)
        try:
            async with self._pool().request(
                method, url, data=data, headers=headers, timeout=limits
            ) as response:
                answer = await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise self._unreachable(url, error) from error
        except TimeoutError as error:
            raise EngineTimeoutError(
                f"the {self._role} at {url} gave no answer within {seconds:.0f} s. {self._remedy}"
            ) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise self._unreachable(url, error) from error
        if response.status != 200:
            raise HttpError(url, response.status, answer.decode("utf-8", "replace"), self._remedy)
        return answer

    def parse(self, url: str, answer: bytes) -> Any:
        """Return the parsed JSON.

        Raises:
            MissingScoreError: it holds NaN, which JSON does not know.
            AnswerError: it is no JSON.
        """
        try:
            return orjson.loads(answer)
        except orjson.JSONDecodeError as error:
            kind = MissingScoreError if b"NaN" in answer else AnswerError
            excerpt = answer[:200].decode("utf-8", "replace")
            raise kind(
                f"the {self._role} at {url} answered 200 with no JSON ({error}): {excerpt!r}. {self._remedy}"
            ) from error

    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            # limit 0: the client bounds the requests; a second bound here would only hide who waits for what
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, read_bufsize=2**20)
        return self._session

    def _unreachable(self, url: str, error: Exception) -> EngineUnreachableError:
        reason = str(error) or type(error).__name__
        return EngineUnreachableError(f"the {self._role} at {url} cannot be reached: {reason}")
