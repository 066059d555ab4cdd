"""The asynchronous client of one kind of server (the student's engines, or the teacher's).

One keep-alive pool, bounded concurrency, a deadline for every request, short retries that end in a clear
error. It moves JSON and knows verbs; what a `/generate` request or answer means is `api.py`'s business.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import orjson

from slime.engines.errors import (
    AnswerError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
)

API_KEY_VARIABLE = "SLIME_ENGINE_API_KEY"
ADMIN_KEY_VARIABLE = "SLIME_ENGINE_ADMIN_KEY"

PauseMode = Literal["abort", "retract", "in_place"]

RETRIED_STATUSES = frozenset({429, 503})
"""Overloaded or starting up: worth another try. A 400 never is, the request itself is wrong."""
REMEMBERED_GROUPS = 65_536
"""How many groups' servers are remembered; far more than are ever in flight."""
KEEP_ALIVE_SECONDS = 4.0
"""Below uvicorn's 5 s: we drop an idle connection before the server closes it under a request."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server: where it generates, and where its other paths hang."""

    generate_url: str
    base_url: str

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read a URL as users give it: bare, or with its path, which is then posted to as it is."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{url!r} is no server address; give it as http://HOST:PORT/generate.")
        path = parts.path.rstrip("/")
        if not path:
            base = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
            return cls(generate_url=f"{base}/generate", base_url=base)
        base = urlunsplit((parts.scheme, parts.netloc, path.rsplit("/", 1)[0], "", ""))
        return cls(generate_url=url, base_url=base)


class EngineClient:
    """Talks to one server, or to several of the same model. Belongs to the event loop that first uses it."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        role: str = "engine",
        remedy: str = "Look at the server's log.",
        concurrency: int = 256,
        timeout: float = 600.0,
        retry_seconds: float = 20.0,
        api_key: str | None = None,
        admin_key: str | None = None,
    ) -> None:
        """Prepare the pool; nothing is sent yet.

        Args:
            urls: the servers, with or without the path of `/generate`.
            role: what error messages call the server.
            remedy: what error messages tell the user to look at.
            concurrency: requests in flight per server.
            timeout: seconds from a request's start to its answer, retries included; waiting for a free place
                is not.
            retry_seconds: how long a server that refuses connections is tried before the last error is
                raised.
            api_key: for `/generate`; None reads SLIME_ENGINE_API_KEY.
            admin_key: for control verbs; None reads SLIME_ENGINE_ADMIN_KEY, then falls back to the API key.
        """
        if not urls:
            raise ValueError(f"no address of a {role} was given; at least one is needed.")
        self.role = role
        self.endpoints = [Endpoint.parse(url) for url in urls]
        self._remedy = remedy
        self._timeout = timeout
        self._retry_seconds = retry_seconds
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        self._admin_key = admin_key or os.environ.get(ADMIN_KEY_VARIABLE) or self._api_key
        self._places = {endpoint: asyncio.Semaphore(concurrency) for endpoint in self.endpoints}
        self._load = dict.fromkeys(self.endpoints, 0)
        self._given = dict.fromkeys(self.endpoints, 0)
        self._groups: OrderedDict[Hashable, Endpoint] = OrderedDict()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the pool. The client may be used again: it opens a new one."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- data ----

    def endpoint_for(self, group: Hashable | None = None) -> Endpoint:
        """Choose the least loaded server; all requests of a group go to one, where its prefix is cached."""
        known = self._groups.get(group) if group is not None else None
        if known is not None:
            return known
        chosen = min(self.endpoints, key=lambda endpoint: (self._load[endpoint], self._given[endpoint]))
        self._given[chosen] += 1
        if group is not None:
            self._groups[group] = chosen
            if len(self._groups) > REMEMBERED_GROUPS:
                self._groups.popitem(last=False)
        return chosen

    async def generate(self, payload: dict[str, Any], *, group: Hashable | None = None) -> Any:
        """Post to `/generate`, as soon as the group's server has a free place; return the parsed answer.

        Raises:
            EngineUnreachableError: no connection, retries included.
            EngineTimeoutError: no answer before the deadline.
            HttpError: an error status.
            AnswerError: the answer is no JSON.
        """
        endpoint = self.endpoint_for(group)
        self._load[endpoint] += 1
        try:
            async with self._places[endpoint]:
                body = await self._request("POST", endpoint.generate_url, payload, self._api_key)
        finally:
            self._load[endpoint] -= 1
        return self._parse(endpoint.generate_url, body)

    # ---- control, on every server ----

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Stop generating. With "retract" running requests wait and recompute their KV cache later."""
        await self._control("POST", "/pause_generation", {"mode": mode})

    async def continue_(self) -> None:
        """Generate again."""
        await self._control("POST", "/continue_generation", {})

    async def flush_cache(self, *, patience: float = 30.0) -> None:
        """Forget all KV caches. A server with pending requests refuses: ask again for `patience` seconds."""
        await asyncio.gather(*(self._flush(endpoint, patience) for endpoint in self.endpoints))

    async def update_weights_from_disk(self, path: str, version: str) -> None:
        """Load a checkpoint folder and name it `version`.

        A server may answer 400 "not flushed" although the weights have changed; then its stale caches are
        flushed here.
        """
        body = {"model_path": path, "weight_version": version, "flush_cache": True}
        await asyncio.gather(*(self._update_from_disk(endpoint, body) for endpoint in self.endpoints))

    async def model_info(self) -> list[dict[str, Any]]:
        """Return each server's `/model_info`: its model, its modalities, its weight version."""
        return await self._control("GET", "/model_info")

    async def server_info(self) -> list[dict[str, Any]]:
        """Return each server's `/server_info`: its resolved arguments and state."""
        return await self._control("GET", "/server_info")

    async def _control(self, method: str, path: str, body: dict[str, Any] | None = None) -> list[Any]:
        """Call one verb on all servers; return the parsed answers in the servers' order."""
        urls = [endpoint.base_url + path for endpoint in self.endpoints]
        bodies = await asyncio.gather(*(self._request(method, url, body, self._admin_key) for url in urls))
        return [self._parse(url, answer) for url, answer in zip(urls, bodies, strict=True)]

    async def _flush(self, endpoint: Endpoint, patience: float) -> None:
        url = endpoint.base_url + "/flush_cache"
        loop = asyncio.get_running_loop()
        give_up = loop.time() + patience
        while True:
            try:
                await self._request("POST", url, {}, self._admin_key)
            except HttpError as error:
                if error.status != 400 or loop.time() >= give_up:
                    raise
                await asyncio.sleep(0.25)
            else:
                return

    async def _update_from_disk(self, endpoint: Endpoint, body: dict[str, Any]) -> None:
        url = endpoint.base_url + "/update_weights_from_disk"
        try:
            answer = self._parse(url, await self._request("POST", url, body, self._admin_key))
        except HttpError as error:
            if error.status != 400 or "not flushed" not in error.body:
                raise
            await self._flush(endpoint, patience=30.0)
            return
        if not (isinstance(answer, dict) and answer.get("success")):
            raise EngineError(f"{url} did not load {body['model_path']}: {str(answer)[:500]}. {self._remedy}")

    # ---- transport ----

    def _pool(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            # limit 0: the semaphores bound the requests; a second bound here would only hide who waits for
            # what
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, read_bufsize=2**20)
        return self._session

    async def _request(self, method: str, url: str, body: dict[str, Any] | None, key: str | None) -> bytes:
        """Send until there is an answer, the deadline, or no hope; return the body of a 200."""
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else orjson.dumps(body)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        first_failure: float | None = None
        tries = 0
        while True:
            tries += 1
            try:
                return await self._send(method, url, data, headers, deadline - loop.time())
            except (EngineUnreachableError, HttpError) as error:
                if isinstance(error, HttpError) and error.status not in RETRIED_STATUSES:
                    raise
                now = loop.time()
                first_failure = first_failure or now
                # full jitter, so that the samples of a rollout do not come back in one wave
                pause = random.uniform(0.1, min(4.0, 0.25 * 2**tries))
                if now + pause > min(deadline, first_failure + self._retry_seconds):
                    raise self._last(error, url, tries, now - first_failure) from error
                await asyncio.sleep(pause)

    def _last(self, error: EngineError, url: str, tries: int, seconds: float) -> EngineError:
        """Word the error that ends the retries."""
        if isinstance(error, HttpError):
            return HttpError(
                url, error.status, error.body, f"{tries} tries in {seconds:.0f} s. {self._remedy}"
            )
        return EngineUnreachableError(f"{error} ({tries} tries in {seconds:.0f} s). {self._remedy}")

    async def _send(
        self, method: str, url: str, data: bytes | None, headers: dict[str, str], seconds_left: float
    ) -> bytes:
        """Send once, reading the whole answer."""
        limits = aiohttp.ClientTimeout(total=max(seconds_left, 0.001), sock_connect=10.0)
        try:
            async with self._pool().request(
                method, url, data=data, headers=headers, timeout=limits
            ) as response:
                body = await response.read()
        except (
            aiohttp.ConnectionTimeoutError,
            aiohttp.ClientConnectionError,
            aiohttp.ClientPayloadError,
        ) as error:
            if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
                raise self._too_late(url) from error
            reason = str(error) or type(error).__name__
            raise EngineUnreachableError(f"the {self.role} at {url} cannot be reached: {reason}") from error
        except TimeoutError as error:
            raise self._too_late(url) from error
        if response.status != 200:
            raise HttpError(url, response.status, body.decode("utf-8", "replace"), self._remedy)
        return body

    def _too_late(self, url: str) -> EngineTimeoutError:
        return EngineTimeoutError(
            f"the {self.role} at {url} gave no answer within {self._timeout:.0f} s. {self._remedy}"
        )

    def _parse(self, url: str, body: bytes) -> Any:
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as error:
            excerpt = body[:200].decode("utf-8", "replace")
            raise AnswerError(
                f"the {self.role} at {url} answered 200 with no JSON: {excerpt!r}. {self._remedy}"
            ) from error
