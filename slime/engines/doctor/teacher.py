"""One teacher's server as the doctor talks to it: plain pages, and `/generate` through the run's own client.

Turns whatever can happen to a request into a named `Fault`. Knows no check.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from slime.engines.client import EngineClient
from slime.engines.doctor.outcome import NUMERICS_REMEDY, Fault
from slime.engines.errors import (
    EngineAbortedError,
    EngineError,
    EngineTimeoutError,
    EngineUnreachableError,
    HttpError,
    MissingScoreError,
    WrongAnswerError,
)
from slime.engines.replicas import Endpoint
from slime.engines.sglang_serve import API_KEY_VARIABLE

PAGE_SECONDS = 10.0
MARKUP = re.compile(r"""['"](\\n|\s)*<""")
"""Where the excerpt of an answer in an error's text begins as HTML does."""
START_REMEDY = "start the teacher, or correct --teacher-url"


@dataclass(frozen=True, slots=True)
class Page:
    """The answer to a GET."""

    url: str
    status: int
    text: str
    is_html: bool
    seconds: float

    def json(self) -> dict[str, Any]:
        """Return the JSON object that the page is.

        Raises:
            Fault: it is none.
        """
        if self.status in (401, 403):
            raise unauthorized(self.url, self.status)
        if self.is_html:
            raise html_page(self.url, self.status)
        if self.status != 200:
            raise Fault(f"http-{self.status}", f"{self.url} answered HTTP {self.status}: {self.text[:200]!r}")
        try:
            value = orjson.loads(self.text)
        except orjson.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise Fault(
                "unreadable-answer",
                f"{self.url} answered {self.text[:200]!r}, no JSON object",
                "give the address of an SGLang server or of our transformers engine",
            )
        return value


class Teacher:
    """One server. Use it as an asynchronous context manager."""

    def __init__(self, url: str, timeout: float) -> None:
        """Prepare; nothing is sent yet.

        Raises:
            ValueError: `url` is no address.
        """
        self.endpoint = Endpoint.parse(url)
        self.timeout = timeout
        self._key = os.environ.get(API_KEY_VARIABLE)
        self._client = EngineClient([url], role="teacher", remedy="", timeout=timeout, patience=0.0)
        self._session: aiohttp.ClientSession | None = None

    @property
    def name(self) -> str:
        """HOST:PORT, as lines show it."""
        return self.endpoint.base_url.split("://", 1)[1]

    async def __aenter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(headers=headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        await self._client.close()

    async def page(self, path: str) -> Page:
        """Get a page, whatever its status.

        Raises:
            Fault: there is no answer.
        """
        assert self._session is not None
        url = self.endpoint.base_url + path
        limit = aiohttp.ClientTimeout(total=min(PAGE_SECONDS, self.timeout))
        started = time.perf_counter()
        try:
            async with self._session.get(url, timeout=limit) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise no_answer(url, error, limit.total or 0.0) from error
        text = body.decode("utf-8", "replace")
        is_html = answer.content_type == "text/html" or text.lstrip()[:1] == "<"
        return Page(url, answer.status, text, is_html, time.perf_counter() - started)

    async def ask(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Post to `/generate`; return the answer, an object with `meta_info`.

        Raises:
            Fault: none came, or it is no such object.
        """
        url = self.endpoint.generate_url
        try:
            answer = await self._client.generate(payload)
        except EngineTimeoutError as error:
            raise await self._hanging(url) from error
        except EngineUnreachableError as error:
            raise no_answer(url, _root(error), self.timeout) from error
        except HttpError as error:
            raise _refused(url, error) from error
        except EngineAbortedError as error:
            raise Fault("aborted", str(error), "do not pause or abort on a teacher") from error
        except EngineError as error:
            raise _unreadable(url, error) from error
        if not isinstance(answer, dict) or not isinstance(answer.get("meta_info"), dict):
            raise Fault("unreadable-answer", f"{url} answered {str(answer)[:200]!r}, without meta_info")
        return answer

    async def _hanging(self, url: str) -> Fault:
        """Tell a paused server from one that hangs: a paused one is not ready."""
        page = await self.page("/ready")
        if page.status == 503:
            return Fault(
                "paused",
                f"{url} gave no answer within {self.timeout:g} s, and /ready says 503: generation is paused",
                "POST /continue_generation; nothing but the student's engines may be paused in a run",
            )
        return Fault(
            "hangs",
            f"{url} gave no answer within {self.timeout:g} s, while /ready says {page.status}",
            "see the teacher's log; a larger --timeout helps if it is only slow",
        )


def no_answer(url: str, error: BaseException, seconds: float) -> Fault:
    """Name why there was no answer at all."""
    reason = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorDNSError | socket.gaierror):
        return Fault("unknown-host", f"{url}: {reason}", "correct the host name in --teacher-url")
    if isinstance(error, aiohttp.ClientSSLError):
        return Fault("tls", f"{url}: {reason}", "use http:// for a server without a certificate")
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return Fault("no-answer", f"{url} gave no answer within {seconds:g} s", START_REMEDY)
    if isinstance(error, aiohttp.ClientConnectorError | ConnectionRefusedError):
        return Fault("refused", f"{url}: {reason}", START_REMEDY)
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError | aiohttp.ClientOSError):
        return Fault("reset", f"{url} closed the connection: {reason}", "see the teacher's log")
    return Fault("no-http", f"{url}: {reason}", "is this the teacher's HTTP port? " + START_REMEDY)


def unauthorized(url: str, status: int) -> Fault:
    """Name a missing or a wrong key."""
    if os.environ.get(API_KEY_VARIABLE):
        return Fault(
            "wrong-key",
            f"{url} answered HTTP {status}: it refuses the key of {API_KEY_VARIABLE}",
            f"set {API_KEY_VARIABLE} to the key that the teacher was started with (--api-key)",
        )
    return Fault(
        "key-missing",
        f"{url} answered HTTP {status} and no key was sent",
        f"set {API_KEY_VARIABLE} to the key that the teacher was started with (--api-key)",
    )


def html_page(url: str, status: int) -> Fault:
    """Name a proxy or another program in the server's place."""
    return Fault(
        "html-page",
        f"{url} answered HTTP {status} with an HTML page: a proxy or another program is there, no engine",
        "give the engine's own address and port, and take it out of any proxy",
    )


def _refused(url: str, error: HttpError) -> Fault:
    if error.status in (401, 403):
        return unauthorized(url, error.status)
    if error.body.lstrip()[:1] == "<":
        return html_page(url, error.status)
    if error.status == 400 and "logprob_start_len" in error.body and "higher than" in error.body:
        return Fault(
            "truncated",
            f"{url} says that fewer tokens arrived than were sent: {error.body[:300]!r}",
            "start the teacher without --allow-auto-truncate, and let input_ids through whole",
        )
    if error.status in (429, 503):
        return Fault(
            "overloaded",
            f"{url} answered HTTP {error.status}: {error.body[:200]!r}",
            "wait until it is idle; raise --max-queued-requests",
        )
    return Fault(
        f"http-{error.status}",
        f"{url} answered HTTP {error.status}: {error.body[:300]!r}",
        "see the teacher's log",
    )


def _unreadable(url: str, error: EngineError) -> Fault:
    text = str(error)
    if isinstance(error, WrongAnswerError):
        return Fault("other-request", text, "take out the proxy that mixes up answers")
    if isinstance(error, MissingScoreError):
        return Fault("null-scores", text, NUMERICS_REMEDY)
    if MARKUP.search(text):
        return html_page(url, 200)
    return Fault("unreadable-answer", text, "use an SGLang server, without a proxy that changes answers")


def _root(error: BaseException) -> BaseException:
    """Return the cause below the client's own errors, which tells refused from unknown."""
    while isinstance(error, EngineError):
        cause = error.__cause__ or error.__context__
        if cause is None:
            break
        error = cause
    return error
