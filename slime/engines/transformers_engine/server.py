"""Routes of the engine: bodies in, answers out, keys checked. Control and generation do the work."""

import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import ClientConnectionResetError, web

from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.control import PAUSE_MODES, Control
from slime.engines.transformers_engine.errors import InvalidValue, MalformedBody, RequestError
from slime.engines.transformers_engine.generation import Generator
from slime.engines.transformers_engine.info import ServerInfo
from slime.engines.transformers_engine.request import parse_generate

MAX_BODY_BYTES = 512 * 2**20
OPEN_PATHS = ("/health", "/ready")
USER_PATHS = ("/generate", "/model_info", "/get_model_info", "/server_info", "/get_server_info", "/v1/models")
FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
Answers = AsyncGenerator[dict[str, Any], None]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Keys:
    """Secrets that guard the engine; None leaves the paths open."""

    api: str | None
    """For everything but health."""
    admin: str | None
    """For the control endpoints, which then take no other key."""


def json_response(body: Any, status: int = 200) -> web.Response:
    """Answer with JSON, or with text where the body is a string."""
    if isinstance(body, str):
        return web.Response(text=body, status=status)
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


class EngineServer:
    """The HTTP application."""

    def __init__(
        self, batcher: Batcher, generator: Generator, control: Control, info: ServerInfo, keys: Keys
    ):
        self._batcher = batcher
        self._generator = generator
        self._control = control
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
            "/update_weights_from_disk": self.update_from_disk,
            "/update_weight_version": self.update_version,
            "/begin_weight_update": self.begin_update,
            "/end_weight_update": self.end_update,
            "/update_weights_from_tensor": self.session_only,
            "/update_weights_from_distributed": self.session_only,
            "/init_weights_update_group": self.unsupported,
            "/destroy_weights_update_group": self.destroy_group,
            "/get_weights_by_name": self.get_weights,
            "/weights_checker": self.unsupported,
            "/release_memory_occupation": self.unsupported,
            "/resume_memory_occupation": self.unsupported,
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
        if request.path.startswith(OPEN_PATHS):
            return await handler(request)
        control = request.path not in USER_PATHS
        key = self._keys.admin if control and self._keys.admin else self._keys.api
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            return json_response({"error": "Unauthorized"}, 401)
        return await handler(request)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`/generate`: one prompt or a list, as JSON or as a stream of events."""
        received = time.monotonic()
        self._batcher.announce(1)
        try:
            body = parse_generate(await _json(request), self._batcher.model.vocab_size)
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
        """200 while the model thread lives and generation is not paused."""
        return web.Response(status=503 if self._batcher.failed or self._control.paused else 200)

    async def health_generate(self, request: web.Request) -> web.Response:
        """Run the model for one token."""
        if self._batcher.failed or self._control.paused:
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
        flushed = await self._control.flush(float(request.query.get("timeout", "0")))
        return json_response(
            FLUSHED if flushed else FLUSHED.replace("flushed", "not flushed", 1), 200 if flushed else 400
        )

    async def pause(self, request: web.Request) -> web.Response:
        """Hold new requests and abort, retract or freeze the running ones."""
        mode = (await _json_object(request)).get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise MalformedBody(
                f"1 validation error:\n  body.mode: Input should be one of {PAUSE_MODES}, got {mode!r}"
            )
        await self._control.pause(mode)
        return json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        """Go on after a pause."""
        await _json_object(request)
        await self._control.resume()
        return json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: web.Request) -> web.Response:
        """Abort one request or all; an unknown id is no error."""
        body = await _json_object(request)
        rid = body.get("rid")
        if body.get("abort_all"):
            self._generator.abort(None)
        elif isinstance(rid, str) and rid:
            self._generator.abort(rid)
        return web.Response()

    async def update_from_disk(self, request: web.Request) -> web.Response:
        """Load a checkpoint's weights in place of the served ones."""
        body = await _json_object(request)
        path, version = _required_str(body, "model_path"), body.get("weight_version")
        if version is not None and not isinstance(version, str):
            raise MalformedBody(
                f"1 validation error:\n  body.weight_version: must be a string, got {version!r}"
            )
        answer = await self._control.update_weights(
            path, version, abort_all=bool(body.get("abort_all_requests")), flush=body.get("flush_cache", True)
        )
        return json_response(answer, 200 if answer["success"] else 400)

    async def update_version(self, request: web.Request) -> web.Response:
        """Rename the served weights; aborts what runs unless told not to."""
        body = await _json_object(request)
        version = _required_str(body, "new_version")
        await self._control.set_version(version, abort_all=body.get("abort_all_requests", True))
        message = f"Weight version updated to {version}"
        return json_response({"success": True, "message": message, "new_version": version})

    async def begin_update(self, request: web.Request) -> web.Response:
        """Open a weight-update session."""
        await _json_object(request)
        if self._control.session_open:
            return _refused("a weight-update session is already open; call end_weight_update() first")
        self._control.session_open = True
        return json_response({"success": True, "message": "Success"})

    async def end_update(self, request: web.Request) -> web.Response:
        """Close the weight-update session."""
        await _json_object(request)
        if not self._control.session_open:
            return _refused("no weight-update session is open; call begin_weight_update() first")
        self._control.session_open = False
        return json_response({"success": True, "message": "Success"})

    async def session_only(self, request: web.Request) -> web.Response:
        """Refuse tensor and distributed updates, first for a missing session as the real server does."""
        if not self._control.session_open:
            name = request.path.removeprefix("/")
            return _refused(f"{name} must run between begin_weight_update() and end_weight_update()")
        return await self.unsupported(request)

    async def destroy_group(self, request: web.Request) -> web.Response:
        """There never is a group here."""
        return _refused("The group to be destroyed does not exist.")

    async def get_weights(self, request: web.Request) -> web.Response:
        """Refused for Qwen3-VL by the real server too."""
        raise InvalidValue("Get parameter by name failed")

    async def unsupported(self, request: web.Request) -> web.Response:
        """Refuse what only a real SGLang server can do."""
        return _refused(
            f"{request.path} is not supported by the transformers engine; update weights by "
            "/update_weights_from_disk, or use an SGLang server."
        )


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


def _refused(message: str) -> web.Response:
    return json_response({"success": False, "message": message}, 400)


async def _json(request: web.Request) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"1 validation error:\n  body: JSON decode error: {error}") from error


async def _json_object(request: web.Request) -> dict[str, Any]:
    body = await _json(request)
    if not isinstance(body, dict):
        raise MalformedBody(
            f"1 validation error:\n  body: Input should be a dictionary, got {str(body)[:80]!r}"
        )
    return body


def _required_str(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise MalformedBody(f"1 validation error:\n  body.{key}: a string is required, got {value!r}")
    return value
