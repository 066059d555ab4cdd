"""The model thread: at every step it admits what waits, decodes one token of every running row, and ends what is done.

It owns the model, the cache and the rows. The HTTP side hands it jobs and runs code between its steps with `call`;
results come back through each job's `notify`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from slime.engines.transformers_engine.errors import EngineFailed
from slime.engines.transformers_engine.job import Job
from slime.engines.transformers_engine.model import EngineModel
from slime.engines.transformers_engine.prompt import Prompt
from slime.engines.transformers_engine.rows import Rows
from slime.engines.transformers_engine.scoring import id_rows, prompt_logprobs, top_rows, wanted_span
from slime.engines.transformers_engine.stopping import StopChecker
from slime.engines.transformers_engine.waiting import ArrivalQueue, WaitingQueue, WaveQueue

T = TypeVar("T")
logger = logging.getLogger(__name__)

SETTLE_SECONDS = 0.003
"""A step waits until no request has arrived for this long, so that requests sent together run together."""
HOLD_SECONDS_IDLE = 0.2
HOLD_SECONDS_RUNNING = 0.03
"""The most that a step waits for arrivals to settle, with nothing and with something running."""


class Batcher:
    """Runs jobs in a thread of its own. Methods without a leading underscore may be called from any thread."""

    def __init__(
        self,
        model: EngineModel,
        stops: StopChecker,
        *,
        max_running: int,
        max_prefill_tokens: int,
        max_total_tokens: int,
        deterministic: bool,
        weight_version: str,
        on_failure: Callable[[], None],
    ):
        self.model = model
        self.weight_version = weight_version
        self._stops = stops
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._max_total_tokens = max_total_tokens
        self._deterministic = deterministic
        self._on_failure = on_failure
        self._waiting: WaitingQueue = WaveQueue() if deterministic else ArrivalQueue()
        self._rows = Rows(max_running, model.new_cache(), model.device)
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
        """Stop stepping. With `retract` the rows give up their cache and start over from their tokens. Use `call`."""
        self._paused = True
        if retract and len(self._rows):
            jobs = self._rows.remove(range(len(self._rows)))
            for job in jobs:
                job.retractions += 1
            self._waiting.put_back(jobs)

    def resume(self) -> None:
        """Step again. Use `call`."""
        self._paused = False

    def set_version(self, version: str) -> None:
        """Name the weights from here on. Use `call`."""
        self.weight_version = version
        for job in (*self._rows.jobs, *self._waiting.jobs()):
            job.use_version(version)

    def running(self) -> int:
        """Number of rows in the cache. Use `call`."""
        return len(self._rows)

    def load(self) -> tuple[int, int]:
        """Number of running and of waiting jobs, without waiting for a step."""
        return len(self._rows), len(self._waiting.jobs()) + len(self._arrived)

    def _run(self) -> None:
        try:
            while self._next_turn():
                self._run_calls()
                self._end_cancelled()
                if not self._paused:
                    self._step()
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
                if not self._paused and (len(self._rows) or self._waiting.runnable(len(self._rows))):
                    return not self._hold()
                self._condition.wait(1.0)
                for job in self._waiting.expire():
                    job.notify(job)
        return False

    def _hold(self) -> bool:
        """Let requests that arrive together become one batch; return True when the thread is to end."""
        begin = time.monotonic()
        limit = begin + (HOLD_SECONDS_RUNNING if len(self._rows) else HOLD_SECONDS_IDLE)
        while not (self._stopping or self._calls or self._cancel_requested):
            now = time.monotonic()
            settled = self._last_arrival + SETTLE_SECONDS
            if now >= limit or (now >= settled and not self._announced):
                break
            self._condition.wait(min(limit, max(settled, now + 0.001)) - now)
        self._take_arrived()
        return self._stopping

    def _take_arrived(self) -> None:
        for job in self._arrived:
            job.use_version(self.weight_version)
            self._waiting.add(job)
        self._arrived.clear()

    def _run_calls(self) -> None:
        with self._condition:
            calls, self._calls = self._calls, []
        for function, future in calls:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to the caller, who waits for it
                future.set_exception(error)

    def _end_cancelled(self) -> None:
        with self._condition:
            if not self._cancel_requested:
                return
            self._cancel_requested = False
        waiting = [job for job in self._waiting.jobs() if job.cancelled]
        self._waiting.drop(waiting)
        for job in waiting:
            job.finish_reason = {"type": "abort", "message": "Abort in waiting queue"}
            job.notify(job)
        rows = [row for row, job in enumerate(self._rows.jobs) if job.cancelled]
        for job in self._rows.remove(rows):
            job.finish_reason = {"type": "abort", "message": "Unknown error", "status_code": None, "err_type": None}
            job.notify(job)

    def _step(self) -> None:
        scoring = self._waiting.take_scoring(self._max_prefill_tokens)
        if scoring:
            self._score(scoring)
        if self._deterministic and not len(self._rows):
            self._rows.cache.clear()
        self._admit()
        if len(self._rows):
            self._decode()

    def _score(self, jobs: list[Job]) -> None:
        for group in self._prefill_groups(jobs):
            hidden, rows, _ = self._prefill(group)
            self._read_prompt_logprobs(group, rows, hidden)
            for job in group:
                job.finish_reason = {"type": "length", "length": 0}
                job.notify(job)

    def _admit(self) -> None:
        """Prefill jobs that join now and sample the first token of each."""
        jobs = self._waiting.take_generating(self._free_rows(), len(self._rows))
        for group in self._prefill_groups(jobs):
            hidden, rows, kv_write = self._prefill(group)
            self._read_prompt_logprobs(group, rows, hidden)
            first = len(self._rows)
            lengths = [job.prompt.length + len(job.output_ids) for job in group]
            self._rows.cache.reserve(first + len(group), max(lengths) + 1)
            kv_write(first)
            self._rows.add(group, lengths)
            index = torch.tensor(rows, device=self.model.device)
            ends = torch.tensor(lengths, device=self.model.device) - 1
            self._sample(hidden[index, ends], first)

    def _free_rows(self) -> int:
        free = self._max_running - len(self._rows)
        waiting = [job for job in self._waiting.jobs() if not job.scoring]
        longest = max((job.prompt.length + job.max_tokens for job in (*self._rows.jobs, *waiting)), default=1)
        fitting = self._max_total_tokens // longest - len(self._rows)
        return max(min(free, fitting), 0 if len(self._rows) else 1)

    def _prefill_groups(self, jobs: list[Job]) -> list[list[Job]]:
        """Split jobs into prefills whose padded size stays within the budget; similar lengths share one."""
        groups: list[list[Job]] = []
        for job in sorted(jobs, key=lambda j: j.prompt.length + len(j.output_ids)):
            length = job.prompt.length + len(job.output_ids)
            if not groups or length * (len(groups[-1]) + 1) > self._max_prefill_tokens:
                groups.append([])
            groups[-1].append(job)
        return groups

    def _prefill(self, jobs: list[Job]) -> tuple[Tensor, list[int], Callable[[int], None]]:
        """Forward the jobs' tokens, equal ones once; return hidden states, each job's row in them, and a cache writer."""
        distinct: dict[bytes, int] = {}
        prompts: list[Prompt] = []
        extras: list[list[int]] = []
        rows: list[int] = []
        for job in jobs:
            key = job.prompt.key + b"|" + bytes(str(job.output_ids), "ascii")
            if key not in distinct:
                distinct[key] = len(prompts)
                prompts.append(job.prompt)
                extras.append(job.output_ids)
            rows.append(distinct[key])
        result = self.model.prefill(prompts, extras)

        def write(first_row: int) -> None:
            sources = torch.tensor(rows, device=self.model.device)
            self._rows.cache.write(first_row, result.kv.keys, result.kv.values, sources)

        return result.hidden, rows, write

    def _read_prompt_logprobs(self, jobs: list[Job], rows: list[int], hidden: Tensor) -> None:
        spans = [
            wanted_span(job, row)
            for job, row in zip(jobs, rows, strict=True)
            if job.logprobs.wanted and job.input is None
        ]
        spans = [span for span in spans if span.end > span.begin]
        if spans:
            for span, result in zip(spans, prompt_logprobs(self.model, hidden, spans), strict=True):
                span.job.input = result

    def _decode(self) -> None:
        rows = self._rows
        rows.cache.reserve(len(rows), rows.longest + 1)
        hidden = self.model.decode(rows.last_tokens, rows.positions, rows.lengths, rows.longest, rows.cache)
        rows.count_cached_token()
        self._sample(hidden, 0)

    def _sample(self, hidden: Tensor, first: int) -> None:
        """Sample one token for rows `first..B-1` out of their final hidden states, and end the rows that are done."""
        rows = self._rows
        tokens, log_probs = self.model.sample(hidden, rows.sampling_batch(first))
        rows.record(first, tokens)
        jobs = rows.jobs[first:]
        values = log_probs.gather(1, tokens[:, None])[:, 0].tolist()
        for job, token, value in zip(jobs, tokens.tolist(), values, strict=True):
            job.output_ids.append(token)
            job.output.values.append(value)
        self._read_alternatives(jobs, log_probs)
        finished = []
        for row, job in enumerate(jobs, first):
            job.finish_reason = self._stops.finish_reason(job)
            if job.finish_reason is not None:
                finished.append(row)
            elif job.stream:
                job.notify(job)
        if finished:
            for job in rows.remove(finished):
                job.notify(job)

    def _read_alternatives(self, jobs: list[Job], log_probs: Tensor) -> None:
        for row, job in enumerate(jobs):
            if not job.logprobs.wanted:
                continue
            if job.logprobs.top:
                job.output.top += top_rows(log_probs[row : row + 1], job.logprobs.top)
            if job.logprobs.token_ids:
                job.output.token_ids += id_rows(log_probs[row : row + 1], job.logprobs.token_ids)

    def _fail_everything(self) -> None:
        with self._condition:
            self._failed = True
            jobs = [*self._rows.jobs, *self._waiting.jobs(), *self._arrived]
            calls, self._calls = self._calls, []
        error = EngineFailed("the model thread died; see the engine's log")
        for job in jobs:
            if not job.done:
                job.error = error
                job.notify(job)
        for _, future in calls:
            future.set_exception(error)
        self._on_failure()
