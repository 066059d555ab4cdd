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


class Held:
    """Signals that wait for the end of a block."""

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let them raise nevertheless, those that have come too, in a part of the block that may be cut
        short."""
        self.let_go()
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)

    def let_go(self) -> None:
        """Put the handlers back, and raise the first signal that has come."""
        self.put_back()
        if self._arrived:
            signal.raise_signal(self._arrived[0])

    def put_back(self) -> None:
        """Put the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._arrived.append(number)


@contextmanager
def held() -> Iterator[Held]:
    """Let a signal wait until the block has ended: what is in it happens whole, or not at all.

    An error in the block goes before it.
    """
    signals = Held()
    try:
        yield signals
    except BaseException:
        signals.put_back()
        raise
    signals.let_go()


def exit_status() -> int:
    """Return what the process ends with after a KeyboardInterrupt: 128 and the number of the first signal."""
    return 128 + (_arrived[0] if _arrived else signal.SIGINT)


def _raise_interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _arrived.append(number)
    raise KeyboardInterrupt
