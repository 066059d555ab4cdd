"""When the responses of a rollout ended and were judged: what overlapped with what."""

from __future__ import annotations

import time


class Clock:
    """When things began and ended, in seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.response_ends: list[float] = []
        self.score_starts: list[float] = []
        self.score_ends: list[float] = []

    def response_ended(self) -> None:
        """Note that a response is complete."""
        self.response_ends.append(time.perf_counter())

    def score_started(self) -> None:
        """Note that a response goes to its judges."""
        self.score_starts.append(time.perf_counter())

    def score_ended(self) -> None:
        """Note that a response is judged."""
        self.score_ends.append(time.perf_counter())
