"""Bytes to one server and back: a keep-alive pool, one attempt at a time, failures as typed errors.

Nothing here tries twice (`retry.py` says when to) or knows what a body means (`api.py` does). Writing and
reading JSON is the loop's heaviest work, so it is done one body a turn of the loop: a rollout's answers that
arrive together would otherwise hold it for as long as all of them take.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

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
MAX_ANSWER_BYTES = 2**30
"""Far more than the longest response's scores; a server that never stops sending must not fill the memory."""

T = TypeVar("T")


class Transport:
    """A pool of connections. Belongs to the event loop that first uses it."""

    def __init__(self, role: str, remedy: str) -> None:
        """`role` is what error messages call the server, `remedy` what they tell the user to look at."""
        self._role = role
        self._remedy = remedy
        self._session: aiohttp.ClientSession | None = None
        self._turn = asyncio.Lock()

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
            EngineUnreachableError: there was no connection, it broke, or what came is no HTTP.
            EngineTimeoutError: no answer within `seconds`.
            HttpError: an error status.
            AnswerError: the answer is longer than any can be.
        """
        headers = {"Content-Type": "application/json"}
        if key and "@" not in urlsplit(url).netloc:  # a URL that names its user brings a key of its own
            headers["Authorization"] = f"Bearer {key}"
        data = None
        if body is not None:
            async with self.turn():
                data = orjson.dumps(body)
        limits = aiohttp.ClientTimeout(total=max(seconds, 0.001), sock_connect=CONNECT_SECONDS)
        try:
            async with self._pool().request(
                method, url, data=data, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                answer = await _whole_body(response)
        except aiohttp.ConnectionTimeoutError as error:
            raise self._unreachable(url, error) from error
        except TimeoutError as error:
            raise EngineTimeoutError(
                f"the {self._role} at {url} gave no answer within {seconds:.0f} s. {self._remedy}"
            ) from error
        except _TooLarge as error:
            raise AnswerError(
                f"the {self._role} at {url} answered with more than {MAX_ANSWER_BYTES} bytes. {self._remedy}"
            ) from error
        except aiohttp.ClientError as error:  # lost connections, cut bodies, what is no HTTP
            raise self._unreachable(url, error) from error
        if response.status != 200:
            raise HttpError(url, response.status, answer.decode("utf-8", "replace"), self._remedy)
        return answer

    async def read(self, url: str, answer: bytes, reader: Callable[[Any], T]) -> T:
        """Return what `reader` makes of the parsed JSON, in one step and a turn of the loop of its own.

        Raises:
            AnswerError: it is no JSON; and whatever `reader` raises.
        """
        async with self.turn():
            with _garbage_left_alone():
                return reader(self.parse(url, answer))

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn of the loop in which nobody else does heavy work through this pool."""
        async with self._turn:
            await asyncio.sleep(0)
            yield

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
        return EngineUnreachableError(
            f"the {self._role} at {url} cannot be reached: {reason}. {self._remedy}"
        )


class _TooLarge(Exception):  # noqa: N818 (an answer, not yet a fault of ours to report)
    """An answer is longer than any can be."""


async def _whole_body(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise _TooLarge
        parts.append(part)
    return b"".join(parts)


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Keep the collector away from thousands of short-lived lists: at 4,096 tokens an answer it took half of
    our time, and each of its full passes stopped the loop for 200 ms."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
