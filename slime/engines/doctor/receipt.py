"""What a scoring answer must look like, and what it means when it does not: the named causes.

Pure. The run's own check (`api.score_triples`) says *that* an answer is not for these tokens; here it is told
*why*, so that a person knows what to change. Shape letters: R response tokens, L all tokens, expanded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slime.engines.api import JsonDict, same_id, score_payload
from slime.engines.doctor.outcome import NUMERICS_REMEDY, Fault

VERBATIM = "use a server that keeps input_ids verbatim beside image_data (SGLang 0.5.14 or newer, no proxy)"


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt, a response and pictures whose scores are asked for."""

    prompt: tuple[int, ...]
    """Wire form: one pad per picture."""
    response: tuple[int, ...]
    """[R]."""
    images: tuple[str, ...] = ()
    """Data URIs."""
    image_tokens: int = 0
    """What the pictures expand to, by our count."""
    vocab_size: int | None = None
    """Of the teacher, as far as it is known: its last id is reported as 0."""

    @property
    def prompt_length(self) -> int:
        """P, expanded."""
        return len(self.prompt) + self.image_tokens - len(self.images)

    @property
    def length(self) -> int:
        """L = P + R."""
        return self.prompt_length + len(self.response)

    def payload(self, start: int | None = None, temperature: float | None = None) -> JsonDict:
        """Build the request; `start` is `logprob_start_len`, P - 1 where it is None."""
        start = self.prompt_length - 1 if start is None else start
        payload = score_payload([*self.prompt, *self.response], start, self.images)
        if temperature is not None:
            payload["sampling_params"] = {**payload["sampling_params"], "temperature": temperature}
        return payload


@dataclass(frozen=True, slots=True)
class Scores:
    """What a good answer holds."""

    log_probs: list[float]
    """[R]."""
    entries: int
    """How many triples came, the placeholder included."""
    cached_tokens: int


def read_scores(answer: JsonDict, probe: Probe, start: int | None = None) -> Scores:
    """Check an answer to `probe.payload(start)` and return its scores.

    Raises:
        Fault: it is not what was asked for; the cause is named as well as can be told.
    """
    meta = answer["meta_info"]
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise Fault("aborted", f"the server aborted the request: {reason.get('message')}", "see its log")
    start = probe.prompt_length - 1 if start is None else start
    _check_picture(meta, probe)
    _check_length(meta, probe, start)
    triples = _check_entries(meta.get("input_token_logprobs"), probe.length - start)
    tail = triples[len(triples) - len(probe.response) :]
    _check_ids([triple[1] for triple in tail], probe.response, probe.vocab_size)
    log_probs = _check_numbers([triple[0] for triple in tail])
    if triples[0][0] is not None:
        raise Fault(
            "off-by-one",
            f"the first of {len(triples)} entries has the log-prob {triples[0][0]!r}, and null is expected: "
            "log-probs are shifted against their ids",
            "use an SGLang server; its first entry is always null",
        )
    return Scores(log_probs, len(triples), _count(meta, "cached_tokens"))


def _count(meta: JsonDict, key: str) -> int:
    """Return a number that the server may leave out."""
    value = meta.get(key)
    return value if isinstance(value, int) else 0


def _check_picture(meta: JsonDict, probe: Probe) -> None:
    seen, expected = _count(meta, "image_tokens"), probe.image_tokens
    grew = _count(meta, "prompt_tokens") - probe.length
    if not expected or (seen == expected and grew == 0):
        return
    counted = (
        f"{seen} image tokens and {meta.get('prompt_tokens')} in all; ours: {expected} and {probe.length}"
    )
    if seen == 0 and grew <= 0:
        raise Fault(
            "picture-dropped",
            f"the server counts {counted}: the picture did not arrive",
            "let image_data through, and serve the checkpoint with its vision tower",
        )
    if grew > 0 and (grew % (expected - 1 or 1) == 0 or grew % expected == 0):
        raise Fault(
            "expanded-twice",
            f"the server counts {counted}: pads are expanded twice",
            f"let one pad per picture through as it is; {VERBATIM}",
        )
    if seen != expected and grew == seen - expected:
        raise Fault(
            "picture-resized",
            f"the server counts {counted}: its processor resizes the picture",
            "give teacher and student the same preprocessor_config.json, or narrow --image-min-pixels and "
            "--image-max-pixels to what both leave alone; drop --mm-process-config",
        )


def _check_length(meta: JsonDict, probe: Probe, start: int) -> None:
    counted = meta.get("prompt_tokens")
    if counted == probe.length:
        return
    if isinstance(counted, int) and counted < probe.length and _is_cut(meta, probe, start):
        raise Fault(
            "truncated",
            f"{probe.length} tokens were sent and the server counts {counted}: it cuts the input short",
            "start the teacher without --allow-auto-truncate and with a larger --context-length",
        )
    raise Fault(
        "retokenised",
        f"{probe.length} tokens were sent and the server counts {counted}: it adds tokens or re-tokenises",
        VERBATIM,
    )


def _is_cut(meta: JsonDict, probe: Probe, start: int) -> bool:
    """Tell whether the scored ids are the beginning of those that were asked for."""
    triples = meta.get("input_token_logprobs")
    if not isinstance(triples, list):
        return True
    ids = [triple[1] for triple in triples if isinstance(triple, list) and len(triple) >= 2]
    asked = [*probe.prompt, *probe.response][start - probe.length :]
    return all(same_id(sent, id_, probe.vocab_size) for id_, sent in zip(ids, asked, strict=False))


def _check_entries(triples: Any, expected: int) -> list[list[Any]]:
    if not isinstance(triples, list) or not all(isinstance(t, list) and len(t) >= 2 for t in triples):
        raise Fault(
            "unreadable-answer",
            f"input_token_logprobs is {str(triples)[:100]!r}; a list of [log-prob, id, text] is needed",
            "use an SGLang server or our transformers engine",
        )
    if abs(len(triples) - expected) == 1:
        raise Fault(
            "off-by-one",
            f"{expected} scored positions were asked for and {len(triples)} came: the start is off by one",
            "use SGLang 0.5.4 or newer; look for a proxy that changes logprob_start_len",
        )
    if len(triples) < expected:
        raise Fault(
            "short-answer",
            f"{expected} scored positions were asked for and {len(triples)} came",
            "look for a proxy that shortens answers, and for --allow-auto-truncate",
        )
    if len(triples) > expected:
        raise Fault(
            "start-ignored",
            f"{expected} scored positions were asked for and {len(triples)} came: logprob_start_len is not "
            "heeded, so every sample pays for the whole prompt",
            "use a server that knows logprob_start_len, without a router that drops it",
        )
    return triples


def _check_ids(reported: Sequence[Any], sent: Sequence[int], vocab_size: int | None) -> None:
    wrong = [place for place, id_ in enumerate(sent) if not same_id(id_, reported[place], vocab_size)]
    if not wrong:
        return
    first = wrong[0]
    seen = (
        f"{len(wrong)} of {len(sent)} ids came back different, the first at {first} (sent {sent[first]}, "
        f"scored {reported[first]})"
    )
    if list(reported[1:]) == list(sent[:-1]) or list(reported[:-1]) == list(sent[1:]):
        raise Fault("ids-shifted", f"{seen}: the ids are shifted by one", VERBATIM)
    if all(reported[place] == 0 for place in wrong):
        raise Fault(
            "ids-clipped",
            f"{seen}: ids are clipped to 0",
            "serve a teacher whose vocabulary holds the student's; " + VERBATIM,
        )
    raise Fault("retokenised", f"{seen}: the input was re-tokenised or is another request's", VERBATIM)


def _check_numbers(values: Sequence[Any]) -> list[float]:
    bad = [place for place, value in enumerate(values) if not _is_log_prob(value)]
    if bad:
        raise Fault(
            "null-scores",
            f"{len(bad)} of {len(values)} log-probs are no numbers at or below 0, the first at {bad[0]} "
            f"({values[bad[0]]!r}); null stands for NaN or -inf",
            NUMERICS_REMEDY,
        )
    return [float(value) for value in values]


def _is_log_prob(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value <= 1e-3
