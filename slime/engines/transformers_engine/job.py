"""One response to be made: what was asked, how far it is, and how it ended.

A job is handed from the HTTP side to the model thread and back.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from slime.engines.transformers_engine.errors import RequestError
from slime.engines.transformers_engine.prompt import Prompt
from slime.engines.transformers_engine.sampling_params import SamplingParams


class TopRow(NamedTuple):
    """Some tokens of one position, as arrays: a rollout's scores hold millions of them."""

    values: npt.NDArray[np.float32]
    """[K], log-probs."""
    ids: npt.NDArray[np.int32]
    """[K]."""

    def first(self, count: int) -> "TopRow":
        """Return the first `count` of them."""
        return TopRow(self.values[:count], self.ids[:count])


@dataclass(frozen=True, kw_only=True)
class LogprobOptions:
    """Which log-probs a request wants."""

    wanted: bool = False
    start: int = -1
    """First prompt position that is reported, in expanded coordinates; -1: none of the prompt."""
    top: int = 0
    """How many of the likeliest tokens to give at each position."""
    token_ids: tuple[int, ...] = ()
    """Further tokens whose log-prob is given at each position."""
    text: bool = False
    """Whether each entry carries the token's text."""
    flat_input: bool = False
    flat_output: bool = False
    base64: bool = False

    def first_input(self, length: int) -> int:
        """First reported position of a prompt of `length` tokens; `length` if none."""
        return length if not self.wanted or self.start < 0 else self.start


@dataclass
class PositionLogprobs:
    """Log-probs of consecutive positions: the reported token's, and the alternatives that were asked for."""

    values: list[float] = field(default_factory=list)
    top: list[TopRow] = field(default_factory=list)
    token_ids: list[TopRow] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Job:
    """A request in the batcher. The HTTP side reads results only after `notify` told it to."""

    rid: str
    prompt: Prompt
    params: SamplingParams
    logprobs: LogprobOptions
    seed: int
    stop_ids: tuple[int, ...]
    max_tokens: int
    notify: Callable[["Job"], None]
    """Called in the model thread when the job is finished, and at each new token if it streams."""
    stream: bool = False

    output_ids: list[int] = field(default_factory=list)
    output: PositionLogprobs = field(default_factory=PositionLogprobs)
    input: PositionLogprobs | None = None
    """Log-probs of prompt positions `start + 1 .. T - 1`."""
    versions: list[tuple[str, int]] = field(default_factory=list)
    """Weight version, and the number of output tokens at which it came into use."""
    retractions: int = 0
    finish_reason: dict[str, Any] | None = None
    error: RequestError | None = None
    cancelled: bool = False
    """Set by any thread; the batcher ends the job as aborted before its next step."""

    @property
    def scoring(self) -> bool:
        """Whether no token is to be generated."""
        return self.max_tokens == 0

    @property
    def done(self) -> bool:
        """Whether the job has ended, in whichever way."""
        return self.finish_reason is not None or self.error is not None

    def snapshot(self) -> "Job":
        """Return a copy whose results stand still while this one goes on."""
        output = PositionLogprobs(
            list(self.output.values), list(self.output.top), list(self.output.token_ids)
        )
        return replace(self, output_ids=list(self.output_ids), output=output, versions=list(self.versions))

    def use_version(self, version: str) -> None:
        """Note that tokens from here on come from weights `version`."""
        if self.versions and self.versions[-1][1] == len(self.output_ids):
            self.versions.pop()
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, len(self.output_ids)))

    def version_spans(self) -> list[dict[str, Any]]:
        """Return which output tokens came from which weights."""
        ends = [start for _, start in self.versions[1:]] + [len(self.output_ids)]
        return [
            {"version": version, "start": start, "end": end}
            for (version, start), end in zip(self.versions, ends, strict=True)
        ]
