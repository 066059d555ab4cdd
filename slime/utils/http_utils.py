"""The one HTTP helper that plugins written for slime import. The engines have a client of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

TIMEOUT_SECONDS = 120.0
RETRIED_STATUS = (408, 429)


async def post(
    url: str, payload: Mapping[str, Any], max_retries: int = 3, headers: Mapping[str, str] | None = None
) -> Any:
    """POST `payload` as JSON and return the JSON of the answer.

    Connection errors, timeouts, 408, 429 and 5xx are tried again, at most `max_retries` times, with growing
    pauses.

    Raises:
        RuntimeError: every attempt failed; the message names the URL and the last failure.
    """
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for attempt in range(max_retries + 1):
            answer, failure, again = await _post_once(session, url, payload, headers)
            if failure is None:
                return answer
            if not again or attempt == max_retries:
                raise RuntimeError(f"POST {url} failed after {attempt + 1} attempts: {failure}")
            await asyncio.sleep(min(5.0, 0.2 * 2**attempt))
    raise ValueError(f"max_retries is {max_retries}; it must be at least 0.")


async def _post_once(
    session: aiohttp.ClientSession, url: str, payload: Mapping[str, Any], headers: Mapping[str, str] | None
) -> tuple[Any, str | None, bool]:
    """Return (answer, what failed or None, whether another attempt may help)."""
    try:
        async with session.post(url, json=payload, headers=headers) as response:
            body = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        return None, f"{type(error).__name__}: {error}", True
    if response.status >= 400:
        text = body[:500].decode("utf-8", "replace")
        return (
            None,
            f"HTTP {response.status}: {text}",
            response.status >= 500 or response.status in RETRIED_STATUS,
        )
    try:
        return json.loads(body), None, False
    except ValueError:
        return None, f"the answer is no JSON: {body[:200]!r}", False
