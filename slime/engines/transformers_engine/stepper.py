"""One step of the running batch: score what is to be scored, admit what waits, decode one token of every row.

Lives in the model thread and knows nothing of threads or HTTP; results go to each job's `notify`.
"""

import torch
from torch import Tensor

from slime.engines.transformers_engine.job import Job
from slime.engines.transformers_engine.model import EngineModel, Prefill
from slime.engines.transformers_engine.prompt import Prompt
from slime.engines.transformers_engine.rows import Rows
from slime.engines.transformers_engine.scoring import id_rows, prompt_logprobs, top_rows, wanted_span
from slime.engines.transformers_engine.stopping import StopChecker
from slime.engines.transformers_engine.waiting import ArrivalQueue, WaitingQueue, WaveQueue


class Stepper:
    """Holds the waiting jobs and the running rows of one model.

    At most `max_running` rows run, whose keys and values take at most `max_total_tokens` when all have
    reached their limit; one prefill takes at most `max_prefill_tokens`, padding included.
    """

    def __init__(
        self,
        model: EngineModel,
        stops: StopChecker,
        *,
        max_running: int,
        max_prefill_tokens: int,
        max_total_tokens: int,
        deterministic: bool,
    ):
        self.model = model
        self.waiting: WaitingQueue = WaveQueue() if deterministic else ArrivalQueue()
        self.rows = Rows(max_running, model.new_cache(), model.device)
        self.held = False
        """While true no step is run: the model's memory is released."""
        self._stops = stops
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._max_total_tokens = max_total_tokens
        self._deterministic = deterministic

    def runnable(self) -> bool:
        """Tell whether a step would do anything."""
        return not self.held and (bool(len(self.rows)) or self.waiting.runnable(len(self.rows)))

    def jobs(self) -> list[Job]:
        """All jobs that are not finished, running ones first."""
        return [*self.rows.jobs, *self.waiting.jobs()]

    def retract(self) -> None:
        """Put every running row back among the waiting; it will start over from its tokens."""
        jobs = self.rows.remove(range(len(self.rows)))
        for job in jobs:
            job.retractions += 1
        self.waiting.put_back(jobs)

    def end_cancelled(self) -> None:
        """End the jobs that were cancelled, as aborted."""
        waiting = [job for job in self.waiting.jobs() if job.cancelled]
        self.waiting.drop(waiting)
        rows = [row for row, job in enumerate(self.rows.jobs) if job.cancelled]
        running = self.rows.remove(rows)
        for job in waiting:
            job.finish_reason = {"type": "abort", "message": "Abort in waiting queue"}
        for job in running:
            job.finish_reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        for job in (*waiting, *running):
            job.notify(job)

    def step(self) -> None:
        """Run one step."""
        scoring = self.waiting.take_scoring(self._max_prefill_tokens)
        if scoring:
            self._score(scoring)
        if self._deterministic and not len(self.rows):
            self.rows.cache.clear()
        self._admit()
        if len(self.rows):
            self._decode()

    def _score(self, jobs: list[Job]) -> None:
        for group in self._prefill_groups(jobs):
            result, rows = self._prefill(group)
            self._read_prompt_logprobs(group, rows, result.hidden)
            for job in group:
                job.finish_reason = {"type": "length", "length": 0}
                job.notify(job)

    def _admit(self) -> None:
        """Prefill jobs that join now and sample the first token of each."""
        jobs = self.waiting.take_generating(self._free_rows(), len(self.rows))
        for group in self._prefill_groups(jobs):
            result, rows = self._prefill(group)
            self._read_prompt_logprobs(group, rows, result.hidden)
            first = len(self.rows)
            lengths = [job.prompt.length + len(job.output_ids) for job in group]
            index, ends = (torch.tensor(part, device=self.model.device) for part in (rows, lengths))
            self.rows.cache.reserve(first + len(group), max(lengths) + 1)
            self.rows.cache.write(first, result.kv.keys, result.kv.values, index)
            self.rows.add(group, lengths)
            self._sample(result.hidden[index, ends - 1], first)

    def _free_rows(self) -> int:
        """Return how many jobs may join: all must fit when each has grown to its limit."""
        waiting = [job for job in self.waiting.jobs() if not job.scoring]
        if not waiting:
            return 0
        longest = max(job.prompt.length + job.max_tokens for job in (*self.rows.jobs, *waiting))
        fitting = max(self._max_total_tokens // longest, 1)
        return max(min(self._max_running, fitting) - len(self.rows), 0)

    def _prefill_groups(self, jobs: list[Job]) -> list[list[Job]]:
        """Split jobs into prefills whose padded size stays within the budget; similar lengths share one."""
        groups: list[list[Job]] = []
        for job in sorted(jobs, key=lambda j: j.prompt.length + len(j.output_ids)):
            length = job.prompt.length + len(job.output_ids)
            if not groups or length * (len(groups[-1]) + 1) > self._max_prefill_tokens:
                groups.append([])
            groups[-1].append(job)
        return groups

    def _prefill(self, jobs: list[Job]) -> tuple[Prefill, list[int]]:
        """Forward the jobs' tokens, equal ones once; return the result and each job's row in it."""
        distinct: dict[bytes, int] = {}
        prompts: list[Prompt] = []
        extras: list[list[int]] = []
        rows: list[int] = []
        for job in jobs:
            key = job.prompt.key + str(job.output_ids).encode()
            if key not in distinct:
                distinct[key] = len(prompts)
                prompts.append(job.prompt)
                extras.append(job.output_ids)
            rows.append(distinct[key])
        return self.model.prefill(prompts, extras), rows

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
        rows = self.rows
        rows.cache.reserve(len(rows), rows.longest + 1)
        hidden = self.model.decode(rows.last_tokens, rows.positions, rows.lengths, rows.longest, rows.cache)
        rows.count_cached_token()
        self._sample(hidden, 0)

    def _sample(self, hidden: Tensor, first: int) -> None:
        """Sample a token for rows `first..B-1` from their final hidden states; end the rows that are done."""
        rows = self.rows
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
