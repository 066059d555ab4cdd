"""Routes of the engine: bodies in, answers out, keys checked. Control and generation do the work."""

import hmac
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import ClientConnectionResetError, web

from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.bodies import json_response, read_json, read_object, wrong
from slime.engines.transformers_engine.control import PAUSE_MODES, Control
from slime.engines.transformers_engine.errors import RequestError
from slime.engines.transformers_engine.generation import Generator
from slime.engines.transformers_engine.info import ServerInfo
from slime.engines.transformers_engine.request import parse_generate
from slime.engines.transformers_engine.update_routes import Handler, UpdateRoutes

MAX_BODY_BYTES = 512 * 2**20
OPEN_PATHS = ("/health", "/ready")
"""Open without a key: they say one bit, and let nobody use the model."""
MAX_FLUSH_SECONDS = 600.0
USER_PATHS = ("/generate", "/model_info", "/get_model_info", "/server_info", "/get_server_info", "/v1/models")
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
Answers = AsyncGenerator[dict[str, Any], None]


@dataclass(frozen=True)
class Keys:
    """Secrets that guard the engine; None leaves the paths open."""

    api: str | None
    """For everything but health."""
    admin: str | None
    """For the control endpoints, which then take no other key."""


class EngineServer:
    """The HTTP application."""

    def __init__(
        self,
        batcher: Batcher,
        generator: Generator,
        control: Control,
        updates: UpdateRoutes,
        info: ServerInfo,
        keys: Keys,
    ):
        self._batcher = batcher
        self._generator = generator
        self._control = control
        self._updates = updates
        self._info = info
        self._keys = keys

    def application(self) -> web.Application:
        """Build the aiohttp application with all routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._errors, self._authorise])
        get = {
            "/health": self.health,
            "/health_generate": self.health_generate,
            "/ready": self.ready,
            "/model_info": self.model_info,
            "/get_model_info": self.model_info,
            "/server_info": self.server_info,
            "/get_server_info": self.server_info,
            "/v1/models": self.models,
        }
        post = {
            "/generate": self.generate,
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/abort_request": self.abort,
            **self._updates.by_path(),
        }
        app.router.add_routes([web.get(path, handler) for path, handler in get.items()])
        app.router.add_routes([web.post(path, handler) for path, handler in post.items()])
        app.router.add_put("/generate", self.generate)
        for path in ("/get_weights_by_name", "/release_memory_occupation", "/resume_memory_occupation"):
            app.router.add_get(path, post[path])
        app.router.add_route("*", "/flush_cache", self.flush)
        return app

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            if error.status >= 500:
                request.app.logger.error("%s %s: %s", request.method, request.path, error)
            return json_response(error.body, error.status)
        except web.HTTPNotFound:
            return json_response({"detail": "Not Found"}, 404)
        except web.HTTPMethodNotAllowed:
            return json_response({"detail": "Method Not Allowed"}, 405)

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        control = request.path not in USER_PATHS
        key = self._keys.admin if control and self._keys.admin else self._keys.api
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode()):
            return json_response({"error": "Unauthorized"}, 401)
        return await handler(request)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`/generate`: one prompt or a list, as JSON or as a stream of events."""
        received = time.monotonic()
        self._batcher.announce(1)
        try:
            body = parse_generate(await read_json(request), self._batcher.model.vocab_size)
        finally:
            self._batcher.announce(-1)
        async with self._control.admitted():
            if body.stream:
                return await self._stream(request, self._generator.stream(body, received))
            return json_response(await self._generator.answer(body, received))

    async def _stream(
        self, request: web.Request, answers: AsyncGenerator[dict[str, Any], None]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        # Closed here and not by the garbage collector, which cannot while a logged traceback holds the
        # frame: a client that leaves between two tokens would keep its row.
        async with aclosing(answers):
            try:
                await response.prepare(request)
                await _write_events(response, answers)
            except ClientConnectionResetError:
                request.app.logger.info("%s: the client left before its answer's end", request.path)
        return response

    async def health(self, request: web.Request) -> web.Response:
        """200 while the model thread lives, generation is not paused and the model's memory is there."""
        return web.Response(status=200 if self._control.serving else 503)

    async def health_generate(self, request: web.Request) -> web.Response:
        """Run the model for one token."""
        if not self._control.serving:
            return web.Response(status=503)
        body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        await self._generator.answer(parse_generate(body, self._batcher.model.vocab_size), time.monotonic())
        return web.Response()

    async def ready(self, request: web.Request) -> web.Response:
        """200 when requests would be served now."""
        return await self.health(request)

    async def model_info(self, request: web.Request) -> web.Response:
        """What is served."""
        return json_response(self._info.model(self._control, self._batcher))

    async def server_info(self, request: web.Request) -> web.Response:
        """Settings, load and the counts of forwards."""
        return json_response(self._info.server(self._control, self._batcher))

    async def models(self, request: web.Request) -> web.Response:
        """The OpenAI-style list, of one."""
        return json_response(self._info.models(self._control))

    async def flush(self, request: web.Request) -> web.Response:
        """Confirm that no request uses the cache, waiting up to `timeout` seconds for it."""
        flushed = await self._control.flush(_seconds(request.query.get("timeout", "0")))
        return json_response(
            FLUSHED if flushed else FLUSHED.replace("flushed", "not flushed", 1), 200 if flushed else 400
        )

    async def pause(self, request: web.Request) -> web.Response:
        """Hold new requests and abort, retract or freeze the running ones."""
        mode = (await read_object(request)).get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise wrong("mode", f"Input should be one of {PAUSE_MODES}", mode)
        await self._control.pause(mode)
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        """Go on after a pause."""
        await read_object(request)
        await self._control.resume()
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: web.Request) -> web.Response:
        """Abort one request or all; an unknown id is no error."""
        body = await read_object(request)
        rid = body.get("rid")
        if body.get("abort_all"):
            self._generator.abort(None)
        elif isinstance(rid, str) and rid:
            self._generator.abort(rid)
        return web.Response()


def _seconds(text: str) -> float:
    """Read the time that a flush may wait; raise MalformedBody."""
    try:
        seconds = float(text)
    except ValueError as error:
        raise wrong("timeout", "a number of seconds is required", text) from error
    if not 0 <= seconds <= MAX_FLUSH_SECONDS:
        raise wrong("timeout", f"from 0 to {MAX_FLUSH_SECONDS:g} seconds are allowed", text)
    return seconds


async def _write_events(response: web.StreamResponse, answers: AsyncGenerator[dict[str, Any], None]) -> None:
    """Write a prepared stream of events to its end; a refusal in mid-stream is its last event."""
    try:
        async for answer in answers:
            await response.write(b"data: " + orjson.dumps(answer) + b"\n\n")
    except RequestError as error:
        shown = {
            "message": str(error),
            "type": "invalid_request_error",
            "code": error.status,
            "retryable": False,
        }
        await response.write(b"data: " + orjson.dumps({"error": shown}) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
