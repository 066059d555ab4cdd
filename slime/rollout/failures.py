"""Samples of one rollout that stay without a score: what is done about them, and when there are too many."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import aiohttp

from slime.engines.errors import MISALIGNED, EngineError
from slime.utils.types import Sample, SampleStatus

if TYPE_CHECKING:
    from slime.arguments import Args


SCORING_ERRORS = (EngineError, aiohttp.ClientError, OSError, json.JSONDecodeError)
"""What a reward plugin raises because of its server; upstream's have an HTTP session of their own."""
UNREADABLE = (*MISALIGNED, aiohttp.ContentTypeError, json.JSONDecodeError)


class TooManyFailedError(EngineError):
    """More samples of a rollout could not be scored than `--opd-max-failed-frac` allows."""


class Failures:
    """The failure budget of one rollout of `total` samples."""

    def __init__(self, args: Args, total: int) -> None:
        self._mask_misaligned = args.opd_misaligned == "mask"
        self._allowed = args.opd_max_failed_frac
        self._total = total
        self._first: dict[str, str] = {}
        self._kinds: Counter[str] = Counter()
        self.misaligned = 0
        """Samples whose scores did not belong to their tokens."""

    @property
    def failed(self) -> int:
        """Samples without a score, misaligned ones included."""
        return self._kinds.total()

    def record(self, sample: Sample, error: Exception) -> None:
        """Mark a sample as failed, so that it is masked out of the loss.

        Raises:
            Exception: `error` itself, where the answer does not belong to the sampled tokens and
                --opd-misaligned is abort.
            TooManyFailedError: the budget is used up.
        """
        if isinstance(error, UNREADABLE):
            if not self._mask_misaligned:
                raise error
            self.misaligned += 1
        kind = type(error).__name__
        self._kinds[kind] += 1
        self._first.setdefault(kind, str(error))
        sample.status = SampleStatus.FAILED
        sample.metadata["error"] = f"{kind}: {error}"
        if self.failed > self._allowed * self._total:
            raise TooManyFailedError(
                f"{self.summary()}; --opd-max-failed-frac {self._allowed:g} allows no more."
            ) from error

    def summary(self) -> str:
        """Say how many samples failed, of what, with the first message of each kind."""
        kinds = "; ".join(
            f"{count} {kind}, the first: {self._first[kind]}" for kind, count in self._kinds.most_common()
        )
        return f"{self.failed} of the rollout's {self._total} samples could not be scored: {kinds}"
