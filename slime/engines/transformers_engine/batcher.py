"""The model thread: it runs step after step while there is work, and what others ask of it between steps.

It owns the stepper. The HTTP side hands it jobs and runs code between its steps with `call`;
results come back through each job's `notify`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from slime.engines.transformers_engine.errors import EngineFailed
from slime.engines.transformers_engine.job import Job
from slime.engines.transformers_engine.stepper import Stepper

T = TypeVar("T")
logger = logging.getLogger(__name__)

SETTLE_SECONDS_IDLE, SETTLE_SECONDS_BUSY = 0.005, 0.002
"""A step waits until no request came for this long, so that requests sent together run together."""
HOLD_SECONDS_IDLE, HOLD_SECONDS_BUSY = 0.5, 0.03
"""The most that a step waits for arrivals to settle. Busy is an engine that runs rows or has only scores to
give: responses end for as long as their rollout lasts, and come to be scored at every moment of it."""


class Batcher:
    """Runs jobs in a thread of its own. Any thread may call a public method that does not say otherwise."""

    def __init__(self, stepper: Stepper, weight_version: str, on_failure: Callable[[], None]):
        self.model = stepper.model
        self.weight_version = weight_version
        self._stepper = stepper
        self._on_failure = on_failure
        self._condition = threading.Condition()
        self._arrived: list[Job] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._announced = 0
        self._last_arrival = 0.0
        self._cancel_requested = False
        self._paused = False
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the model thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the model thread after its current step."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    @property
    def failed(self) -> bool:
        """Whether the model thread died of an error."""
        return self._failed

    def announce(self, change: int) -> None:
        """Say that a request is being prepared (+1) or no longer is (-1); steps wait briefly for it."""
        with self._condition:
            self._announced += change
            self._last_arrival = time.monotonic()
            self._condition.notify()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hand over jobs; raise EngineFailed if the model thread is dead."""
        with self._condition:
            if self._failed:
                raise EngineFailed("the model thread died; see the engine's log")
            self._arrived.extend(jobs)
            self._last_arrival = time.monotonic()
            self._condition.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs as aborted before the next step."""
        with self._condition:
            for job in jobs:
                job.cancelled = True
            self._cancel_requested = True
            self._condition.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` in the model thread between two steps, also while paused."""
        future: Future[T] = Future()
        with self._condition:
            if self._failed:
                raise EngineFailed("the model thread died; see the engine's log")
            self._calls.append((function, future))
            self._condition.notify()
        return future

    def pause(self, retract: bool) -> None:
        """Stop stepping; with `retract` the rows give up their cache. For `call` only."""
        self._paused = True
        if retract:
            self._stepper.retract()

    def resume(self) -> None:
        """Step again. For `call` only."""
        self._paused = False

    def set_version(self, version: str) -> None:
        """Name the weights from here on. For `call` only."""
        self.weight_version = version
        for job in self._stepper.jobs():
            job.use_version(version)

    def running(self) -> int:
        """Number of rows in the cache. For `call` only."""
        return len(self._stepper.rows)

    def load(self) -> tuple[int, int]:
        """Number of running and of waiting jobs, without waiting for a step."""
        return len(self._stepper.rows), len(self._stepper.waiting) + len(self._arrived)

    def _run(self) -> None:
        try:
            while self._next_turn():
                self._run_calls()
                if self._cancel_requested:
                    self._cancel_requested = False
                    self._stepper.end_cancelled()
                elif not self._paused and self._stepper.runnable():
                    self._stepper.step()
        except BaseException:
            logger.exception("the model thread died")
            self._fail_everything()
            raise

    def _next_turn(self) -> bool:
        """Wait until there is something to do; return False when the thread is to end."""
        with self._condition:
            while not self._stopping:
                self._take_arrived()
                if self._calls or self._cancel_requested:
                    return True
                if not self._paused and self._stepper.runnable():
                    return not self._hold()
                self._condition.wait(1.0)
                for job in self._stepper.waiting.expire():
                    job.notify(job)
        return False

    def _hold(self) -> bool:
        """Let requests that arrive together become one batch; return True when the thread is to end."""
        settle, hold = self._patience()
        limit = time.monotonic() + hold
        while not (self._stopping or self._calls or self._cancel_requested):
            now = time.monotonic()
            settled = self._last_arrival + settle
            if now >= limit or (now >= settled and not self._announced):
                break
            self._condition.wait(min(limit, max(settled, now + 0.001)) - now)
        self._take_arrived()
        return self._stopping

    def _patience(self) -> tuple[float, float]:
        """Return the quiet time that a step waits for, and the most that it waits."""
        stepper = self._stepper
        if len(stepper.rows) or all(job.scoring for job in stepper.waiting.jobs()):
            return SETTLE_SECONDS_BUSY, HOLD_SECONDS_BUSY
        return SETTLE_SECONDS_IDLE, HOLD_SECONDS_IDLE

    def _take_arrived(self) -> None:
        for job in self._arrived:
            job.use_version(self.weight_version)
            self._stepper.waiting.add(job)
        self._arrived.clear()

    def _run_calls(self) -> None:
        with self._condition:
            calls, self._calls = self._calls, []
        for function, future in calls:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to the caller, who waits for it
                future.set_exception(error)

    def _fail_everything(self) -> None:
        with self._condition:
            self._failed = True
            jobs = [*self._stepper.jobs(), *self._arrived]
            calls, self._calls = self._calls, []
        error = EngineFailed("the model thread died; see the engine's log")
        for job in jobs:
            if not job.done:
                job.error = error
                job.notify(job)
        for _, future in calls:
            future.set_exception(error)
        self._on_failure()
