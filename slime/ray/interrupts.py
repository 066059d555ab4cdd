"""SIGINT and SIGTERM as exceptions while the run works, and as nothing while it is being ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM arrived; raised where the main thread is, like KeyboardInterrupt for SIGINT."""


def listen() -> None:
    """Let both signals raise. Called once more after `ray.init`, which puts a handler of its own in the way.

    SIGINT is set too: a background job of a script starts with it ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _raise_terminated)


def ignore() -> None:
    """Ignore both signals for the little that is left of the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def shielded() -> Iterator[None]:
    """Ignore both signals, so that an impatient second Ctrl-C does not cut the clean-up short."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated
