"""When a failed request is worth another try, how long to wait for it, and when to give up."""

from __future__ import annotations

import asyncio
import random
import time

from slime.engines.errors import EngineError, EngineUnreachableError, HttpError, StaleWeightsError

PASSING_STATUSES = frozenset({408, 429, 502, 503, 504})
"""Overloaded, starting up, or behind a proxy that lost it: tried for as long as patience lasts."""
DOUBTFUL_STATUSES = frozenset({500})
"""May pass, or be this request's own fault (a picture that the server cannot read). A 400 is never tried
again, the request itself is wrong."""
DOUBTFUL_TRIES = 3
"""How often a request is sent at most whose failure may be its own fault, or that of a server that hangs."""
LONGEST_PAUSE = 4.0


class Retry:
    """The tries of one request."""

    def __init__(self, patience: float, *, repeatable: bool) -> None:
        """Prepare.

        Args:
            patience: seconds, from the first failure on, in which another try may begin.
            repeatable: whether it may be sent again though the server may have acted on it (no answer in
                time, an internal error).
        """
        self._patience = patience
        self._repeatable = repeatable
        self._first_failure: float | None = None
        self._doubtful = 0
        self.tries = 0

    @property
    def seconds(self) -> float:
        """Seconds since the first failure."""
        return 0.0 if self._first_failure is None else time.monotonic() - self._first_failure

    def pause(self, error: EngineError, *, elsewhere: bool) -> float | None:
        """Count a failure; return the seconds to wait before the next try, None to give up.

        Exponential with full jitter, so that the samples of a rollout do not come back in one wave. With
        another server to go to (`elsewhere`) there is nothing to wait for the first time.
        """
        self.tries += 1
        if self._first_failure is None:
            self._first_failure = time.monotonic()
        if not (elsewhere if isinstance(error, StaleWeightsError) else self._worth_another(error)):
            return None
        if elsewhere and self.tries == 1:
            return 0.0
        pause = random.uniform(0.1, min(LONGEST_PAUSE, 0.25 * 2**self.tries))
        return pause if self.seconds + pause <= self._patience else None

    async def wait(self, error: EngineError, url: str, remedy: str, *, elsewhere: bool = False) -> None:
        """Wait until another try is due; where none is, raise the error, with what was tried."""
        pause = self.pause(error, elsewhere=elsewhere)
        if pause is not None:
            await asyncio.sleep(pause)
            return
        if self.tries == 1:
            raise error
        tried = f"{self.tries} tries in {self.seconds:.0f} s"
        if isinstance(error, HttpError):
            raise HttpError(url, error.status, error.body, f"{tried}. {remedy}") from error
        raise type(error)(f"{error} ({tried})") from error

    def _worth_another(self, error: EngineError) -> bool:
        if isinstance(error, EngineUnreachableError):
            return True
        if isinstance(error, HttpError) and error.status not in DOUBTFUL_STATUSES:
            return error.status in PASSING_STATUSES
        self._doubtful += 1
        return self._repeatable and self._doubtful < DOUBTFUL_TRIES
