"""The asynchronous client of one kind of server (the student's engines, or the teacher's).

Bounded concurrency, a deadline for every attempt, retries that end in a clear error, several replicas. What
a `/generate` request or answer means is `api.py`'s business, what else a server does is `control.py`'s.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, TypeVar

from slime.engines.errors import (
    EngineError,
    EnginesLostError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    StaleWeightsError,
    WrongAnswerError,
)
from slime.engines.replicas import Endpoint, Replica, Replicas
from slime.engines.retry import Retry
from slime.engines.sglang_serve import API_KEY_VARIABLE
from slime.engines.transport import Transport

T = TypeVar("T")
Reader = Callable[[Any], T]
"""Makes of a parsed answer what is kept of it."""

REQUEST_ID = "slime-"
"""Begins every request's id, so that an answer to somebody else's request is known for what it is."""
GONE_STATUSES = (502, 503, 504)
"""A server that is not there, or takes no work. A 500 is about the request at hand."""
PROBE_SECONDS = 1.0
PROBE_TIMEOUT = 5.0


def as_it_is(answer: Any) -> Any:
    """Keep all of an answer."""
    return answer


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
        patience: float = 20.0,
        api_key: str | None = None,
    ) -> None:
        """Prepare the pool; nothing is sent yet.

        Args:
            urls: the servers, with or without the path of `/generate`.
            role: what error messages call the server.
            remedy: what error messages tell the user to look at.
            concurrency: requests in flight per server.
            timeout: seconds that one attempt may take; waiting for a free place is not counted.
            patience: seconds, from a request's first failure on, in which it is tried again.
            api_key: None reads SLIME_ENGINE_API_KEY.
        """
        if not urls:
            raise ValueError(f"no address of a {role} was given; at least one is needed.")
        self.role = role
        self.endpoints = [Endpoint.parse(url) for url in dict.fromkeys(urls)]
        self._remedy = remedy
        self._timeout = timeout
        self._patience = patience
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        self._replicas = Replicas(self.endpoints, concurrency)
        self._transport = Transport(role, remedy)
        self._probes: set[asyncio.Task[None]] = set()
        self._version: str | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the pool. The client may be used again: it opens a new one."""
        await self._take_all_in()
        await self._transport.close()

    async def expect(self, version: str) -> None:
        """Take no answer from now on but of the weights `version`, which all servers have just been given."""
        self._version = version
        await self._take_all_in()

    # ---- data ----

    def endpoint_for(self, group: Hashable | None = None) -> Endpoint:
        """Choose the least loaded server; all requests of a group go to one, where its prefix is cached."""
        return self._replicas.home(group).replica.endpoint

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Return a context in which to build a large request: one at a time, each in a turn of the loop."""
        return self._transport.turn()

    async def generate(
        self, payload: dict[str, Any], *, group: Hashable | None = None, reader: Reader[T] = as_it_is
    ) -> T:
        """Post to `/generate`, as soon as the group's server has a free place; return what `reader` makes of
        the parsed answer.

        Raises:
            EngineUnreachableError: no connection, retries included.
            EngineTimeoutError: no answer before the deadline, retries included.
            HttpError: an error status, retries included where another try could help.
            EnginesLostError: the first or second of these, or other weights than were expected, after
                `expect`.
            AnswerError: the answer is no JSON, or belongs to another request; and whatever `reader` raises.
        """
        retry = Retry(self._patience, repeatable=True)
        while True:
            replica = self._replicas.home(group).replica
            try:
                return await self._attempt(replica, payload, reader)
            except (EngineUnreachableError, EngineTimeoutError, HttpError, StaleWeightsError) as error:
                gone = not isinstance(error, HttpError) or error.status in GONE_STATUSES
                if gone:
                    self._leave_out(replica)
                elsewhere = self._replicas.elsewhere(replica)
                try:
                    await retry.wait(error, replica.endpoint.generate_url, self._remedy, elsewhere=elsewhere)
                except EngineError as last:
                    if gone and self._version is not None:
                        raise EnginesLostError(str(last)) from last
                    raise

    async def score(
        self, payload: dict[str, Any], *, group: Hashable | None = None, reader: Reader[T] = as_it_is
    ) -> T:
        """Post like `generate`; a group's first request goes alone, and the others find its prefix cached.

        Sent at once, n samples of a new prompt would all miss the cache, and prompt and picture would be
        prefilled n times.
        """
        while group is not None:
            home = self._replicas.home(group)
            if home.open:
                break
            async with home.lock:
                if home.open or self._replicas.home(group) is not home:
                    continue
                try:
                    answer = await self.generate(payload, group=group, reader=reader)
                except (EngineUnreachableError, EngineTimeoutError, HttpError) as error:
                    # it was the server's fault: one after the other the rest would each be as patient
                    home.open = not isinstance(error, HttpError) or error.status >= 500
                    raise
                self._replicas.home(group).open = True  # the group may have moved meanwhile
                return answer
        return await self.generate(payload, group=group, reader=reader)

    async def _attempt(self, replica: Replica, payload: dict[str, Any], reader: Reader[T]) -> T:
        """Send one request to one server, under an id of its own: a retried id could still be running."""
        url, request_id = replica.endpoint.generate_url, REQUEST_ID + uuid.uuid4().hex
        replica.load += 1
        try:
            async with replica.places:
                body = payload | {"rid": request_id}
                raw = await self._transport.send("POST", url, body, self._api_key, self._timeout)
        finally:
            replica.load -= 1

        def read(answer: Any) -> T:
            self._check_id(url, answer, request_id)
            self._check_version(url, answer)
            return reader(answer)

        return await self._transport.read(url, raw, read)

    def _check_id(self, url: str, answer: Any, request_id: str) -> None:
        """Refuse another request's answer. A gateway may drop our id; then the tokens' receipt has to do."""
        answered = _meta(answer).get("id")
        if isinstance(answered, str) and answered.startswith(REQUEST_ID) and answered != request_id:
            raise WrongAnswerError(
                f"the {self.role} at {url} answered request {answered} in the place of {request_id}; "
                f"something between mixes up answers. {self._remedy}"
            )

    def _check_version(self, url: str, answer: Any) -> None:
        version = _meta(answer).get("weight_version")
        if self._version is not None and version not in (None, self._version):
            raise StaleWeightsError(
                f"the {self.role} at {url} answered with weights {version!r}, and {self._version!r} are the "
                f"current ones: it was started anew. {self._remedy}"
            )

    # ---- replicas that fail ----

    async def _take_all_in(self) -> None:
        """Stop probing and count on every server again."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        for replica in self._replicas.all:
            replica.up = True

    def _leave_out(self, replica: Replica) -> None:
        """Send nothing more to a server that failed until it says that it is ready; a lone one is all there
        is."""
        if len(self._replicas.all) == 1 or not replica.up:
            return
        replica.up = False
        probe = asyncio.create_task(self._probe(replica))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, replica: Replica) -> None:
        """Ask until the server is ready and, after `expect`, has the weights that were expected."""
        while not replica.up:
            await asyncio.sleep(PROBE_SECONDS)
            replica.up = await self._serves(replica.endpoint)

    async def _serves(self, endpoint: Endpoint) -> bool:
        """Ask `GET /ready`, which costs a server nothing, and which weights it has."""
        try:
            await self._get(endpoint.base_url + "/ready")
            if self._version is None:
                return True
            info = await self._get(endpoint.base_url + "/model_info")
            return self._transport.parse(endpoint.base_url, info).get("weight_version") == self._version
        except HttpError as error:
            # an older server does not know the path, and is there
            return error.status in (404, 405)
        except EngineError:
            return False

    async def _get(self, url: str) -> bytes:
        return await self._transport.send("GET", url, None, self._api_key, PROBE_TIMEOUT)


def _meta(answer: Any) -> dict[str, Any]:
    """Return an answer's `meta_info`, empty where it has none."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    return meta if isinstance(meta, dict) else {}
