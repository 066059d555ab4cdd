"""The asynchronous client of one kind of server (the student's engines, or the teacher's).

Bounded concurrency, a deadline for every attempt, retries that end in a clear error, several replicas. What
a `/generate` request or answer means is `api.py`'s business, what else a server does is `control.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, TypeVar

from slime.engines import keys
from slime.engines.errors import (
    EngineError,
    EnginesLostError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    StaleWeightsError,
    WrongAnswerError,
    excerpt,
)
from slime.engines.replicas import Endpoint, Replica, Replicas
from slime.engines.retry import Retry
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
ABORT_TIMEOUT = 5.0

logger = logging.getLogger(__name__)


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
        self._api_key = api_key or keys.api_key()
        self._replicas = Replicas(self.endpoints, concurrency)
        self._transport = Transport(role, remedy)
        self._probes: set[asyncio.Task[None]] = set()
        self._version: str | None = None
        self._abort_refused = False

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
        self,
        payload: dict[str, Any],
        *,
        group: Hashable | None = None,
        reader: Reader[T] = as_it_is,
        abort_when_cancelled: bool = False,
    ) -> T:
        """Post to `/generate`, as soon as the group's server has a free place; return what `reader` makes of
        the parsed answer.

        With `abort_when_cancelled` a caller that is cancelled leaves only when the server has been told to
        stop computing. A lost connection alone is noticed late: SGLang looks for it every four seconds.

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
                return await self._attempt(replica, payload, reader, abort_when_cancelled)
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

    async def _attempt(
        self, replica: Replica, payload: dict[str, Any], reader: Reader[T], abort_when_cancelled: bool
    ) -> T:
        """Send one request to one server, under an id of its own: a retried id could still be running."""
        url, request_id = replica.endpoint.generate_url, REQUEST_ID + uuid.uuid4().hex
        replica.load += 1
        try:
            async with replica.places:
                body = payload | {"rid": request_id}
                sending = self._transport.send("POST", url, body, self._api_key, self._timeout)
                if abort_when_cancelled:
                    sending = self._abortable(sending, replica, request_id)
                raw = await sending
        finally:
            replica.load -= 1

        def read(answer: Any) -> T:
            self._check_id(url, answer, request_id)
            self._check_version(url, answer)
            return reader(answer)

        return await self._transport.read(url, raw, read)

    async def _abortable(
        self, sending: Coroutine[Any, Any, bytes], replica: Replica, request_id: str
    ) -> bytes:
        """Wait for a request; when cancelled, abort it at its server before the connection is dropped."""
        sent = asyncio.create_task(sending)
        try:
            return await asyncio.shield(sent)
        except asyncio.CancelledError:
            await self._abort(replica, request_id)
            raise
        finally:
            sent.cancel()

    async def _abort(self, replica: Replica, request_id: str) -> None:
        """Tell a server to stop computing a request; one that refuses notices the lost connection."""
        url, body = replica.endpoint.base_url + "/abort_request", {"rid": request_id}
        try:
            await self._transport.send("POST", url, body, keys.admin_key(), ABORT_TIMEOUT)
        except EngineError as error:
            if not self._abort_refused:
                self._abort_refused = True
                logger.warning(
                    "A request could not be aborted, and more may follow: %s. The %s stops computing it when "
                    "it notices that the connection is gone.",
                    str(error).rstrip("."),
                    self.role,
                )

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
                f"the {self.role} at {url} answered with weights {excerpt(version)!r}, and "
                f"{self._version!r} are the current ones: it was started anew. {self._remedy}"
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
            said = self._transport.parse(endpoint.base_url, info)
            return isinstance(said, dict) and said.get("weight_version") == self._version
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
