"""What can go wrong with a server, one class for each thing that a caller treats differently.

A failure of transport or server may be worth another try (`retry.py`). `MISALIGNED` answers arrived and
cannot be used; asking again would not help.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

_USER = re.compile(r"(?<=://)[^\s/?#@]+@")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 400
_SHORT.maxlist = _SHORT.maxdict = 20
_SHORT.maxlevel = 4


def excerpt(value: Any, length: int = 200) -> str:
    """Return the beginning of a foreign value as text.

    `str` of one that is large would take long, and of one that is nested a thousand times it would fail.
    """
    return (value if isinstance(value, str) else _SHORT.repr(value))[:length]


def without_users(text: str) -> str:
    """Return a text with user and password of its URLs masked."""
    return _USER.sub("***@", text)


class EngineError(RuntimeError):
    """A server did not do what was asked of it. User and password of the URLs in its message are masked."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(without_users(text) if isinstance(text, str) else text for text in arguments))


class HttpError(EngineError):
    """A server answered with an error status."""

    def __init__(self, url: str, status: int, body: str, remedy: str = "") -> None:
        super().__init__(f"{url} answered HTTP {status}: {body[:500]!r}. {remedy}".rstrip())
        self.url = url
        self.status = status
        self.body = body
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the constructor's arguments: the error travels from Ray actors to the driver."""
        return type(self), (self.url, self.status, self.body, self.remedy)


class EngineUnreachableError(EngineError, ConnectionError):
    """No connection to a server, retries included."""


class EngineTimeoutError(EngineError, TimeoutError):
    """A server did not answer before the deadline, retries included."""


class StaleWeightsError(EngineError):
    """A server answered with other weights than it was last given: it was started anew meanwhile."""


class EnginesLostError(EngineError):
    """None of the student's engines answers with its current weights; new ones must be given to them."""


class EngineAbortedError(EngineError):
    """A server cut the request off (`finish_reason` abort)."""


class AnswerError(EngineError, ValueError):
    """A server answered 200 with something that cannot be read."""


class WrongAnswerError(AnswerError):
    """The answer belongs to another request: its id is not the one that was sent."""


class MissingScoreError(AnswerError):
    """A log-prob is null or no number; null is how a server writes NaN and -inf."""


class ScoreMismatchError(EngineError, ValueError):
    """The scores that came back do not belong to the tokens that were sent."""


class LengthMismatchError(ScoreMismatchError):
    """The server counts another number of prompt tokens than we do."""


class PictureMismatchError(ScoreMismatchError):
    """A picture did not arrive, or its processor sees another number of patches than ours."""


class ShortScoresError(ScoreMismatchError):
    """There are fewer scores than response tokens."""


class TokenMismatchError(ScoreMismatchError):
    """The ids that were scored are not the ids that were sampled."""


MISALIGNED = (AnswerError, ScoreMismatchError)
"""Errors of an answer that arrived and is not what was asked for."""
