"""SIGINT and SIGTERM as KeyboardInterrupt while the run works, and as nothing while it is being ended.

Both raise the same exception: Ray's calls let a KeyboardInterrupt through, and make a SystemError of any
other.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_arrived: list[int] = []
"""The stop signals that have raised, oldest first."""


def listen() -> None:
    """Let both signals raise. Called once more after `ray.init`, which puts a handler of its own in the way.

    SIGINT is set too: a background job of a script starts with it ignored.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _raise_interrupt)


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


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until the block has ended: what is in it happens whole, or not at all."""
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


def exit_status() -> int:
    """Return what the process ends with after a KeyboardInterrupt: 128 and the number of the first signal."""
    return 128 + (_arrived[0] if _arrived else signal.SIGINT)


def _raise_interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _arrived.append(number)
    raise KeyboardInterrupt
