"""The asynchronous client of one kind of server (the student's engines, or the teacher's).

Bounded concurrency, a deadline for every attempt, retries that end in a clear error, several replicas. It
moves JSON and knows verbs; what a `/generate` request or answer means is `api.py`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Self, TypeVar

from slime.engines.errors import (
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    WrongAnswerError,
)
from slime.engines.replicas import Endpoint, Replica, Replicas
from slime.engines.retry import Retry
from slime.engines.transport import Transport

API_KEY_VARIABLE = "SLIME_ENGINE_API_KEY"
ADMIN_KEY_VARIABLE = "SLIME_ENGINE_ADMIN_KEY"

PauseMode = Literal["abort", "retract", "in_place"]
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
        admin_key: str | None = None,
    ) -> None:
        """Prepare the pool; nothing is sent yet.

        Args:
            urls: the servers, with or without the path of `/generate`.
            role: what error messages call the server.
            remedy: what error messages tell the user to look at.
            concurrency: requests in flight per server.
            timeout: seconds that one attempt may take; waiting for a free place is not counted.
            patience: seconds, from a request's first failure on, in which it is tried again.
            api_key: for `/generate`; None reads SLIME_ENGINE_API_KEY.
            admin_key: for control verbs; None reads SLIME_ENGINE_ADMIN_KEY, then falls back to the API key.
        """
        if not urls:
            raise ValueError(f"no address of a {role} was given; at least one is needed.")
        self.role = role
        self.endpoints = [Endpoint.parse(url) for url in dict.fromkeys(urls)]
        self._remedy = remedy
        self._timeout = timeout
        self._patience = patience
        self._api_key = api_key or os.environ.get(API_KEY_VARIABLE)
        self._admin_key = admin_key or os.environ.get(ADMIN_KEY_VARIABLE) or self._api_key
        self._replicas = Replicas(self.endpoints, concurrency)
        self._transport = Transport(role, remedy)
        self._probes: set[asyncio.Task[None]] = set()
        self._abort_refused = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the pool. The client may be used again: it opens a new one."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        for replica in self._replicas.all:
            replica.up = True
        await self._transport.close()

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
            AnswerError: the answer is no JSON, or belongs to another request; and whatever `reader` raises.
        """
        retry = Retry(self._patience, repeatable=True)
        while True:
            replica = self._replicas.home(group).replica
            try:
                return await self._attempt(replica, payload, reader, abort_when_cancelled)
            except (EngineUnreachableError, EngineTimeoutError, HttpError) as error:
                if not isinstance(error, HttpError) or error.status in GONE_STATUSES:
                    self._leave_out(replica)
                elsewhere = self._replicas.elsewhere(replica)
                await self._pause(retry, error, replica.endpoint.generate_url, elsewhere=elsewhere)

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
            await self._transport.send("POST", url, body, self._admin_key, ABORT_TIMEOUT)
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
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        answered = meta.get("id") if isinstance(meta, dict) else None
        if isinstance(answered, str) and answered.startswith(REQUEST_ID) and answered != request_id:
            raise WrongAnswerError(
                f"the {self.role} at {url} answered request {answered} in the place of {request_id}; "
                f"something between mixes up answers. {self._remedy}"
            )

    # ---- replicas that fail ----

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
        """Ask `GET /ready`, which costs a server nothing, until it is answered."""
        url = replica.endpoint.base_url + "/ready"
        while not replica.up:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                await self._transport.send("GET", url, None, self._api_key, PROBE_TIMEOUT)
            except HttpError as error:
                # an older server does not know the path, and is there
                replica.up = error.status in (404, 405)
            except EngineError:
                continue
            else:
                replica.up = True

    async def _pause(self, retry: Retry, error: EngineError, url: str, *, elsewhere: bool = False) -> None:
        """Wait until another try is due; where none is, raise the error, with what was tried."""
        pause = retry.pause(error, elsewhere=elsewhere)
        if pause is not None:
            await asyncio.sleep(pause)
            return
        if retry.tries == 1:
            raise error
        tried = f"{retry.tries} tries in {retry.seconds:.0f} s"
        if isinstance(error, HttpError):
            raise HttpError(url, error.status, error.body, f"{tried}. {self._remedy}") from error
        raise type(error)(f"{error} ({tried})") from error

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

    async def _request(self, method: str, url: str, body: dict[str, Any] | None) -> bytes:
        """Send a control verb until there is an answer or no hope.

        One that gets no answer in time is not repeated. A lost connection is another matter: all verbs may be
        said twice.
        """
        retry = Retry(self._patience, repeatable=False)
        while True:
            try:
                return await self._transport.send(method, url, body, self._admin_key, self._timeout)
            except (EngineUnreachableError, EngineTimeoutError, HttpError) as error:
                await self._pause(retry, error, url)

    async def _control(self, method: str, path: str, body: dict[str, Any] | None = None) -> list[Any]:
        """Call one verb on all servers; return the parsed answers in the servers' order."""
        urls = [endpoint.base_url + path for endpoint in self.endpoints]
        bodies = await asyncio.gather(*(self._request(method, url, body) for url in urls))
        return [self._transport.parse(url, answer) for url, answer in zip(urls, bodies, strict=True)]

    async def _flush(self, endpoint: Endpoint, patience: float) -> None:
        url = endpoint.base_url + "/flush_cache"
        loop = asyncio.get_running_loop()
        give_up = loop.time() + patience
        while True:
            try:
                await self._request("POST", url, {})
            except HttpError as error:
                if error.status != 400 or loop.time() >= give_up:
                    raise
                await asyncio.sleep(0.25)
            else:
                return

    async def _update_from_disk(self, endpoint: Endpoint, body: dict[str, Any]) -> None:
        url = endpoint.base_url + "/update_weights_from_disk"
        try:
            answer = self._transport.parse(url, await self._request("POST", url, body))
        except HttpError as error:
            if error.status != 400 or "not flushed" not in error.body:
                raise
            await self._flush(endpoint, patience=30.0)
            return
        if not (isinstance(answer, dict) and answer.get("success")):
            raise EngineError(f"{url} did not load {body['model_path']}: {str(answer)[:500]}. {self._remedy}")
