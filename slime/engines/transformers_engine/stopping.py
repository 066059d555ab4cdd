"""When a response ends: token limit, stop tokens, stop strings."""

import math
from typing import Any

from slime.engines.transformers_engine.job import Job


class StopChecker:
    """Decides after each token whether a job is finished, and why."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._named_ids = len(tokenizer)

    def finish_reason(self, job: Job) -> dict[str, Any] | None:
        """Return the reason to end `job` after its newest token, None to go on."""
        token = job.output_ids[-1]
        count = len(job.output_ids)
        if token in job.stop_ids and count >= job.params.min_new_tokens:
            return {"type": "stop", "matched": token}
        if job.params.stop:
            matched = self._matched_string(job)
            if matched is not None:
                return {"type": "stop", "matched": matched}
        if count >= job.max_tokens:
            return {"type": "length", "length": count}
        if math.isnan(job.output.values[-1]):
            return {"type": "stop", "matched": "NaN happened"}
        return None

    def decode(self, ids: list[int], **options: bool) -> str:
        """Decode ids; one without a token in the tokenizer reads as id 0, as on the real server."""
        return self._tokenizer.decode([id_ if id_ < self._named_ids else 0 for id_ in ids], **options)

    def response_text(self, job: Job) -> str:
        """Return the job's text so far, without the stop that ended it unless that is to stay."""
        params, ids = job.params, job.output_ids
        matched = (job.finish_reason or {}).get("matched")
        trim = matched is not None and not params.no_stop_trim
        if trim and isinstance(matched, int):
            ids = ids[:-1]
        text = self.decode(
            ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        if trim and isinstance(matched, str) and matched in text:
            text = text[: text.index(matched)]
        return text

    def _matched_string(self, job: Job) -> str | None:
        # A token holds at least one byte, so this many tokens cover a stop string that ends in the newest
        # one.
        window = max(len(stop.encode()) for stop in job.params.stop) + 1
        tail = self.decode(job.output_ids[-window:])
        return next((stop for stop in job.params.stop if stop in tail), None)
