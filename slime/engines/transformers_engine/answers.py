"""Finished (or streaming) jobs to the JSON of `/generate`."""

import base64
import time
from typing import Any

import numpy as np

from slime.engines.transformers_engine.job import Job, TopRow
from slime.engines.transformers_engine.prompt import reported_ids
from slime.engines.transformers_engine.stopping import StopChecker


class AnswerWriter:
    """Builds answers; holds what all of them need."""

    def __init__(self, stops: StopChecker, vocab_size: int):
        self._stops = stops
        self._vocab_size = vocab_size

    def answer(
        self, job: Job, *, weight_version: str, received: float, prompt_token_ids: bool
    ) -> dict[str, Any]:
        """Return the answer of a job as it stands; `received` is when the request came (`time.monotonic`)."""
        finished = job.finish_reason is not None
        meta: dict[str, Any] = {
            "id": job.rid,
            "finish_reason": job.finish_reason,
            "prompt_tokens": job.prompt.length,
            "weight_version": weight_version,
            "num_retractions": job.retractions,
        }
        if job.logprobs.wanted:
            meta |= self._logprobs(job, finished)
        meta |= {"reasoning_tokens": 0, "completion_tokens": len(job.output_ids), "cached_tokens": 0}
        if finished:
            meta["weight_versions"] = job.version_spans()
        meta["cached_tokens_details"] = None
        if job.prompt.image_tokens:
            meta["image_tokens"] = job.prompt.image_tokens
        meta["dp_rank"] = None
        if finished:
            meta["e2e_latency"] = time.monotonic() - received
        meta["response_sent_to_client_ts"] = time.time()
        answer = {
            "text": self._stops.response_text(job),
            "output_ids": list(job.output_ids),
            "meta_info": meta,
        }
        if prompt_token_ids:
            answer["prompt_token_ids"] = job.prompt.ids.tolist()
        return answer

    def _logprobs(self, job: Job, finished: bool) -> dict[str, Any]:
        options, prompt = job.logprobs, job.prompt
        start = options.first_input(prompt.length)
        count = max(prompt.length - start, 0)
        reported = reported_ids(prompt.target_ids[start:], self._vocab_size)
        input_values = [None, *(job.input.values if job.input else [])][:count]
        if len(input_values) < count:  # aborted before its prefill
            reported = reported[: len(input_values)]
        fields: dict[str, Any] = {
            "input_token_logprobs": self._triples(input_values, reported[: len(input_values)], job),
            "output_token_logprobs": self._triples(job.output.values, job.output_ids, job),
            "output_token_logprobs_length": len(job.output_ids),
        }
        if options.top:
            rows, after = self._input_rows(job.input.top if job.input else [], count, job)
            outputs = after or job.output.top
            fields |= self._top("input", rows, job, options.flat_input)
            fields |= self._top("output", outputs, job, options.flat_output and finished)
        if options.token_ids:
            rows, after = self._input_rows(job.input.token_ids if job.input else [], count, job)
            fields["input_token_ids_logprobs"] = [self._row(row, job) for row in rows]
            outputs = after or job.output.token_ids
            fields["output_token_ids_logprobs"] = [self._row(row, job) for row in outputs]
        return fields

    def _input_rows(
        self, rows: list[TopRow], count: int, job: Job
    ) -> tuple[list[TopRow | None], list[TopRow]]:
        """Split a prompt's rows: those of reported positions, first null, and that after the last token."""
        before = max(count - 1, 0)
        listed: list[TopRow | None] = [None, *rows[:before]] if count else []
        return listed, rows[-1:] if job.scoring and len(rows) > before else []

    def _triples(self, values: list[float | None] | list[float], ids: list[int], job: Job) -> list[list[Any]]:
        if job.logprobs.text:
            return [[value, id_, self._stops.decode([id_])] for value, id_ in zip(values, ids, strict=True)]
        return [[value, id_, None] for value, id_ in zip(values, ids, strict=True)]

    def _row(self, row: TopRow | None, job: Job) -> list[list[Any]] | None:
        if row is None:
            return None
        return self._triples(row.values.tolist(), row.ids.tolist(), job)

    def _top(
        self, side: str, rows: list[TopRow | None] | list[TopRow], job: Job, flat: bool
    ) -> dict[str, Any]:
        if not flat:
            return {f"{side}_top_logprobs": [self._row(row, job) for row in rows]}
        present = [row for row in rows if row is not None]
        prefix = f"{side}_top_logprobs"
        shape = {
            f"{prefix}_shape": [len(present), job.logprobs.top],
            f"{prefix}_null_prefix": len(rows) - len(present),
        }
        values = np.concatenate([row.values for row in present] or [np.empty(0)]).astype("<f4")
        ids = np.concatenate([row.ids for row in present] or [np.empty(0)]).astype("<i4")
        if not job.logprobs.base64:
            return {f"{prefix}_val_flat": values.tolist(), f"{prefix}_idx_flat": ids.tolist()} | shape
        return {
            f"{prefix}_val_flat_b64": _base64(values),
            f"{prefix}_idx_flat_b64": _base64(ids),
            f"{prefix}_val_flat_b64_dtype": "float32",
            f"{prefix}_idx_flat_b64_dtype": "int32",
        } | shape


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
