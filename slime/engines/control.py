"""The control verbs of one or several engines: hold, update, flush, release. Each is said to all of them.

Who waits for what, and in which order the verbs come, is decided by those who call them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from slime.engines import keys
from slime.engines.errors import (
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    excerpt,
)
from slime.engines.replicas import Endpoint
from slime.engines.retry import Retry
from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from slime.engines.transport import Transport

UNAUTHORISED = 401
STUDENT_REMEDY = "Is the student's engine running? Look at its log in the run's output folder."
"""What messages about a run's own engines tell the user to look at."""
FLUSH_POLL_SECONDS = 0.25
FLUSH_PATIENCE = 30.0

PauseMode = Literal["abort", "retract", "in_place"]
MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
Body = Mapping[str, Any]


class EngineControl:
    """Says control verbs to servers of one model. Belongs to the event loop that first uses it."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        role: str = "engine",
        remedy: str = "Look at the server's log.",
        timeout: float = 600.0,
        patience: float = 20.0,
        admin_key: str | None = None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            urls: the servers, with or without the path of `/generate`.
            role: what error messages call a server.
            remedy: what error messages tell the user to look at.
            timeout: seconds that one verb may take.
            patience: seconds, from a verb's first failure on, in which it is said again.
            admin_key: None reads SLIME_ENGINE_ADMIN_KEY, then SLIME_ENGINE_API_KEY.
        """
        self.urls = [Endpoint.parse(url).base_url for url in urls]
        self._remedy = remedy
        self._timeout = timeout
        self._patience = patience
        self._admin_key = admin_key or keys.admin_key()
        self._transport = Transport(role, remedy)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; the next verb opens new ones."""
        await self._transport.close()

    # ---- generation ----

    async def pause(self, mode: PauseMode = "retract") -> None:
        """Stop generating. With "retract" running requests wait and recompute their KV cache later."""
        await self._everywhere("/pause_generation", {"mode": mode})

    async def continue_(self) -> None:
        """Generate again."""
        await self._everywhere("/continue_generation", {})

    async def flush_cache(self, *, patience: float = FLUSH_PATIENCE) -> None:
        """Forget all KV caches. A server with pending requests refuses: ask again for `patience` seconds."""
        await asyncio.gather(*(self._flush(url, patience) for url in self.urls))

    # ---- weights ----

    async def begin_weight_update(self) -> None:
        """Open a session. One that a trainer left open when it died is closed before."""
        await asyncio.gather(*(self._begin(url) for url in self.urls))

    async def end_weight_update(self) -> None:
        """Close the session: the servers make of the new weights what they derive from them."""
        await self._everywhere("/end_weight_update", {})

    async def update_weights_from_disk(self, path: str, version: str) -> None:
        """Load a checkpoint folder and name it `version`. Needs no session.

        A server may answer 400 "not flushed" although the weights have changed; then its stale caches are
        flushed here.
        """
        body = {"model_path": path, "weight_version": version, "flush_cache": True}
        await asyncio.gather(*(self._update_from_disk(url, body) for url in self.urls))

    async def update_weights_from_tensor(
        self, payloads: Sequence[Sequence[str]], version: str | None
    ) -> None:
        """Load named tensors that lie in memory which the server can open. Needs a session.

        Args:
            payloads: for each server, one serialised list of (name, tensor) for each of its ranks.
            version: name of the weights, given with the last part of them; None with the others.
        """
        bodies = [
            {"serialized_named_tensors": list(payload), "flush_cache": False} | _named(version)
            for payload in payloads
        ]
        await self._each("/update_weights_from_tensor", bodies)

    async def init_weights_update_group(
        self, *, address: str, port: int, offsets: Sequence[int], world_size: int, name: str, backend: str
    ) -> None:
        """Join a process group, the first rank of each server at its offset. Returns when all have joined."""
        common = {"master_address": address, "master_port": port, "world_size": world_size}
        common |= {"group_name": name, "backend": backend}
        await self._each("/init_weights_update_group", [common | {"rank_offset": rank} for rank in offsets])

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        version: str | None,
    ) -> None:
        """Receive one flat broadcast from rank 0 of the group and load its tensors. Needs a session."""
        body = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        body |= {"group_name": group, "flush_cache": False, "load_format": "flattened_bucket"}
        await self._everywhere("/update_weights_from_distributed", body | _named(version))

    async def destroy_weights_update_group(self, name: str) -> None:
        """Leave a process group."""
        await self._everywhere("/destroy_weights_update_group", {"group_name": name})

    # ---- memory ----

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Give memory back. The server must be idle: SGLang dies otherwise."""
        await self._everywhere("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Take released memory again; weights come back without content. SGLang dies of what is not
        released."""
        await self._everywhere("/resume_memory_occupation", {"tags": list(tags)})

    # ---- facts ----

    async def server_info(self) -> list[dict[str, Any]]:
        """Return each server's `/server_info`: its resolved arguments and state."""
        return await self._everywhere("/server_info", None)

    # ---- how ----

    async def _everywhere(self, path: str, body: Body | None) -> list[Any]:
        """Say one verb to all servers (GET without a body); return the answers in the servers' order."""
        return await self._each(path, [body] * len(self.urls))

    async def _each(self, path: str, bodies: Sequence[Body | None]) -> list[Any]:
        urls = [url + path for url in self.urls]
        return list(await asyncio.gather(*map(self._say, urls, bodies)))

    async def _say(self, url: str, body: Body | None) -> Any:
        """Say a verb; return the parsed answer.

        Raises:
            HttpError: an error status.
            EngineError: the answer says that it was not done.
        """
        answer = self._transport.parse(url, await self._request(url, body))
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"{url} was not done: {excerpt(answer.get('message'), 500)}. {self._remedy}")
        return answer

    async def _request(self, url: str, body: Body | None) -> bytes:
        """Send a verb until there is an answer or no hope.

        One that gets no answer in time is not repeated. A lost connection is another matter: all verbs may be
        said twice.
        """
        retry = Retry(self._patience, repeatable=False)
        method = "GET" if body is None else "POST"
        data = None if body is None else dict(body)
        # Facts are for users, whom a server with an admin key alone lets in without one.
        key = keys.api_key() if body is None else self._admin_key
        while True:
            try:
                return await self._transport.send(method, url, data, key, self._timeout)
            except HttpError as error:
                if error.status == UNAUTHORISED:
                    name = API_KEY_VARIABLE if body is None else ADMIN_KEY_VARIABLE
                    raise HttpError(
                        url, error.status, error.body, f"Set {name} to the key that it was started with."
                    ) from error
                await retry.wait(error, url, self._remedy)
            except (EngineUnreachableError, EngineTimeoutError) as error:
                await retry.wait(error, url, self._remedy)

    async def _begin(self, url: str) -> None:
        try:
            await self._say(url + "/begin_weight_update", {})
        except HttpError as error:
            if error.status != 400 or "already open" not in error.body:
                raise
            await self._say(url + "/end_weight_update", {})
            await self._say(url + "/begin_weight_update", {})

    async def _flush(self, base_url: str, patience: float) -> None:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + patience
        while True:
            try:
                await self._request(base_url + "/flush_cache", {})
            except HttpError as error:
                if error.status != 400 or loop.time() >= give_up:
                    raise
                await asyncio.sleep(FLUSH_POLL_SECONDS)
            else:
                return

    async def _update_from_disk(self, base_url: str, body: Body) -> None:
        url = base_url + "/update_weights_from_disk"
        try:
            answer = await self._say(url, body)
        except HttpError as error:
            if error.status != 400 or "not flushed" not in error.body:
                raise
            await self._flush(base_url, FLUSH_PATIENCE)
            return
        if not (isinstance(answer, dict) and answer.get("success")):
            raise EngineError(
                f"{url} did not load {body['model_path']}: {excerpt(answer, 500)}. {self._remedy}"
            )


def _named(version: str | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": version}
