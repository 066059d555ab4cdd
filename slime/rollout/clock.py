"""When the responses of a rollout ended and were judged: what overlapped with what."""

from __future__ import annotations

import time

from slime.metrics.trace import Span


class Clock:
    """When things began and ended, in seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self._epoch = time.time() - self.start
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

    @property
    def last_response(self) -> float:
        """When the generation ended."""
        return max(self.response_ends)

    @property
    def scoring_seconds(self) -> float:
        """From the first response that went to its judges to the last verdict."""
        return max(self.score_ends) - min(self.score_starts)

    @property
    def exposed_seconds(self) -> float:
        """How much of that came after the last response, where nothing was generated any more."""
        begin = max(self.last_response, min(self.score_starts))
        return max(max(self.score_ends) - begin, 0.0)

    def spans(self, rollout_id: int) -> tuple[Span, ...]:
        """Return generation, scoring, and what of the rollout came after both, which ends now."""
        scored = max(self.score_ends)
        return (
            self._span("generation", self.start, self.last_response, rollout_id),
            self._span("scoring", min(self.score_starts), scored, rollout_id),
            self._span("post-processing", scored, time.perf_counter(), rollout_id),
        )

    def _span(self, stage: str, start: float, end: float, rollout_id: int) -> Span:
        return Span(
            stage=stage, start=self._epoch + start, seconds=end - start, facts={"rollout_id": rollout_id}
        )
