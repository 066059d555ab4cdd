"""JSON bodies in and out: reading them, checking their keys, answering."""

from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from slime.engines.errors import excerpt
from slime.engines.transformers_engine.errors import MalformedBody
from slime.engines.transformers_engine.schema import is_int

MAX_SIZE = 2**40
"""Of one dimension of a tensor."""


def json_response(body: Any, status: int = 200) -> web.Response:
    """Answer with JSON, or with text where the body is a string."""
    if isinstance(body, str):
        return web.Response(text=body, status=status)
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def done(message: str = "Success") -> web.Response:
    """Answer that a control verb did what it says."""
    return json_response({"success": True, "message": message})


def refused(message: str) -> web.Response:
    """Answer that a control verb was not, or not wholly, obeyed."""
    return json_response({"success": False, "message": message}, 400)


async def read_json(request: web.Request) -> Any:
    """Return the body, decoded; raise MalformedBody."""
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"1 validation error:\n  body: JSON decode error: {error}") from error


async def read_object(request: web.Request) -> dict[str, Any]:
    """Return the body, an object; raise MalformedBody. A GET may have none."""
    if request.method == "GET" and not request.body_exists:
        return {}
    body = await read_json(request)
    if not isinstance(body, dict):
        raise MalformedBody(
            f"1 validation error:\n  body: Input should be a dictionary, got {excerpt(body, 80)!r}"
        )
    return body


def required_str(body: dict[str, Any], key: str) -> str:
    """Return a string; raise MalformedBody."""
    value = body.get(key)
    if not isinstance(value, str):
        raise wrong(key, "a string is required", value)
    return value


def optional_str(body: dict[str, Any], key: str) -> str | None:
    """Return a string or None; raise MalformedBody."""
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise wrong(key, "must be a string", value)
    return value


def required_int(body: dict[str, Any], key: str, least: int, most: int) -> int:
    """Return an integer from `least` to `most`; raise MalformedBody."""
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise wrong(key, f"an integer from {least} to {most} is required", value)
    return value


def required_strings(body: dict[str, Any], key: str) -> list[str]:
    """Return a list of strings; raise MalformedBody."""
    value = body.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(key, "a list of strings is required", value)
    return value


def required_shapes(body: dict[str, Any], key: str) -> list[Sequence[int]]:
    """Return a list of shapes; raise MalformedBody."""
    value = body.get(key)
    if not isinstance(value, list) or not all(isinstance(shape, list) for shape in value):
        raise wrong(key, "a list of shapes is required", value)
    if not all(is_int(size) and 0 <= size <= MAX_SIZE for shape in value for size in shape):
        raise wrong(key, f"a shape has integers from 0 to {MAX_SIZE}", value)
    return value


def wrong(key: str, needed: str, value: Any) -> MalformedBody:
    """Build the error for a value that a key must not have."""
    return MalformedBody(f"1 validation error:\n  body.{key}: {needed}, got {excerpt(value, 80)!r}")
