"""The wire: what SGLang's `/generate` is asked and what its answers mean.

With `scores.py`, its half for scoring, the only place where a run reads that JSON (the doctor looks at it
closer). Pure: no sockets, no clock. `client.py` moves the bytes, `rollout/` decides what to ask. Positions in
answers count the *expanded* sequence (one image pad became `grid.prod() // merge²` tokens), the ids that are
sent hold one pad per image. Shape letters: R response tokens, K teacher top-k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from slime.engines.errors import AnswerError, EngineAbortedError, MissingScoreError, excerpt

JsonDict = dict[str, Any]
ENDINGS = ("stop", "length")
Triple = Sequence[Any]
"""`[log-prob or null, token id, text or null]`, as the server sends it."""

ROUNDING = 1e-3
"""Between two numbers that the server made from the same logits."""
LOWEST = -3.4028234663852886e38
"""What float32, in which log-probs are kept, can still hold."""
BAN_BIAS = -1.0e5
"""Added to the logit of a token that must never be sampled: beyond any real logit, and finite, as JSON
demands."""


def collapse_image_pads(tokens: Sequence[int], image_token_id: int) -> list[int]:
    """Return the wire form of a prompt: each run of image pads becomes one, which the server expands."""
    if tokens.count(image_token_id) <= 1:
        return list(tokens)
    wire: list[int] = []
    for token, run in groupby(tokens):
        wire.extend([token] if token == image_token_id else run)
    return wire


def sampling_params(
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
    stop: Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    banned_ids: Sequence[int] = (),
) -> JsonDict:
    """Build SGLang's `sampling_params`, which may hold no key that the server does not know."""
    params: JsonDict = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
    }
    if stop:
        params["stop"] = list(stop)
    if stop_token_ids:
        params["stop_token_ids"] = list(stop_token_ids)
    if banned_ids:
        params["logit_bias"] = {str(token): BAN_BIAS for token in banned_ids}
    return params


def generate_payload(
    tokens: Sequence[int], params: Mapping[str, Any], images: Sequence[str] = ()
) -> JsonDict:
    """Build the request that samples a response to `tokens` (wire form) and returns its log-probs."""
    payload: JsonDict = {"input_ids": list(tokens), "sampling_params": dict(params), "return_logprob": True}
    if images:
        payload["image_data"] = list(images)
    return payload


def score_payload(
    tokens: Sequence[int], logprob_start_len: int, images: Sequence[str] = (), *, top_k: int = 0
) -> JsonDict:
    """Build the request that scores the tokens behind position `logprob_start_len` (expanded), sampling
    nothing.

    With `logprob_start_len = P - 1` the answer holds a placeholder and R log-probs, and the prompt's prefix
    cache is used. A negative value would bring a real server down, so it is refused here. `top_k` asks for
    the likeliest tokens of each position too, in the compact form; a server that does not know it answers in
    the long one.
    """
    if logprob_start_len < 0:
        raise ValueError(
            f"logprob_start_len is {logprob_start_len}; it must be the prompt's length less one, 0 or more."
        )
    payload: JsonDict = {
        "input_ids": list(tokens),
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": logprob_start_len,
    }
    if images:
        payload["image_data"] = list(images)
    if top_k > 0:
        payload |= {
            "top_logprobs_num": top_k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
    return payload


@dataclass(frozen=True, slots=True)
class GenerateAnswer:
    """One sampled response."""

    text: str
    tokens: list[int]
    """[R], as sampled, end-of-sequence included."""
    log_probs: list[float]
    """[R], under the weights and the temperature that sampled them."""
    truncated: bool
    """Whether the response ran into its token limit."""
    prompt_tokens: int
    """Expanded length of the prompt."""
    cached_tokens: int
    weight_versions: list[str]
    """In order of use, without repetition."""


def parse_generate(answer: Any, *, vocab_size: int | None = None) -> GenerateAnswer:
    """Read the answer to `generate_payload`.

    Raises:
        EngineAbortedError: the server cut the response off.
        AnswerError: the answer is malformed, a log-prob is no number, or ids and log-probs do not belong
            together.
    """
    meta = meta_info(answer)
    tokens = field(answer, "output_ids", list)
    if not set(map(type, tokens)) <= {int} or (tokens and min(tokens) < 0):
        raise AnswerError(f"`output_ids` is {excerpt(tokens)!r}; token ids are needed.")
    if vocab_size is not None and tokens and max(tokens) >= vocab_size:
        raise AnswerError(f"`output_ids` holds {max(tokens)}; the vocabulary has {vocab_size} ids.")
    triples = triples_of(meta, "output_token_logprobs")
    if len(tokens) != len(triples):
        raise AnswerError(f"the engine sampled {len(tokens)} tokens and sent {len(triples)} log-probs.")
    for position, (token, triple) in enumerate(zip(tokens, triples, strict=True)):
        if not same_id(token, triple[1], vocab_size):
            raise AnswerError(
                f"output_ids[{position}] is {token} and its log-prob is for id {excerpt(triple[1])}."
            )
    return GenerateAnswer(
        text=field(answer, "text", str),
        tokens=tokens,
        log_probs=[
            log_prob(triple[0], f"output log-prob {position}") for position, triple in enumerate(triples)
        ],
        truncated=finish_type(meta) == "length",
        prompt_tokens=count(meta, "prompt_tokens"),
        cached_tokens=count(meta, "cached_tokens") if meta.get("cached_tokens") else 0,
        weight_versions=_weight_versions(meta),
    )


def same_id(sent: int, reported: Any, vocab_size: int | None) -> bool:
    """Say whether the server's id stands for ours; ids from `vocab_size - 1` on come back as 0."""
    if type(reported) is not int:  # 1.0 and true are equal to 1, and no ids
        return False
    return reported == sent or (reported == 0 and vocab_size is not None and sent >= vocab_size - 1)


def meta_info(answer: Any) -> JsonDict:
    if not isinstance(answer, dict):
        raise AnswerError(
            f"/generate answered {type(answer).__name__} {excerpt(answer)!r}; one JSON object is needed."
        )
    return field(answer, "meta_info", dict)


def field(record: Mapping[str, Any], key: str, kind: type) -> Any:
    """Return `record[key]`, which must be of type `kind`."""
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise AnswerError(f"the answer's `{key}` is {excerpt(value)!r}; {kind.__name__} is needed.")
    return value


def count(record: Mapping[str, Any], key: str) -> int:
    """Return `record[key]`, which must be a number of things."""
    value = field(record, key, int)
    if value < 0:
        raise AnswerError(f"the answer's `{key}` is {value}; 0 or more is needed.")
    return value


def finish_type(meta: Mapping[str, Any]) -> str:
    """Return how the request ended: "stop" or "length"."""
    reason = field(meta, "finish_reason", dict)
    if reason.get("type") == "abort":
        raise EngineAbortedError(
            f"the server aborted the request: {excerpt(reason.get('message') or 'no reason given', 500)}."
        )
    if reason.get("matched") == "NaN happened":
        raise AnswerError("the server met NaN while it generated; its weights or numerics are broken.")
    kind = field(reason, "type", str)
    if kind not in ENDINGS:
        raise AnswerError(f"the request ended by {kind[:80]!r}; {' or '.join(ENDINGS)} is understood.")
    return kind


def triples_of(meta: Mapping[str, Any], key: str) -> list[Triple]:
    triples = field(meta, key, list)
    for position, triple in enumerate(triples):
        if not isinstance(triple, list) or len(triple) < 2:
            raise AnswerError(
                f"`{key}[{position}]` is {excerpt(triple, 100)!r}; [log-prob, token id, text] is needed."
            )
    return triples


def number(value: Any, what: str) -> float:
    """Return a finite float. JSON has no NaN or infinity: the server writes `null` for them."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < math.inf:
        raise MissingScoreError(
            f"{what} is {excerpt(value)}; a finite number is needed (null stands for NaN or -inf on the "
            "server)."
        )
    if abs(value) > -LOWEST:  # an integer may be too large for any float
        raise MissingScoreError(f"{what} is beyond what a float32 holds; a log-prob is needed.")
    return float(value)


def log_prob(value: Any, what: str) -> float:
    """Return a finite number that the logarithm of a probability can be."""
    checked = number(value, what)
    if not LOWEST < checked <= ROUNDING:
        raise AnswerError(f"the {what} is {checked:g}; none is above 0.")
    return checked


def _weight_versions(meta: Mapping[str, Any]) -> list[str]:
    """Return the versions that produced the response, in order. Older servers report the last one alone."""
    if not meta.get("weight_versions"):
        return [str(field(meta, "weight_version", str))]
    spans = field(meta, "weight_versions", list)
    if not all(isinstance(span, dict) for span in spans):
        raise AnswerError(f"`weight_versions` is {excerpt(spans)!r}; a list of objects is needed.")
    return list(dict.fromkeys(str(field(span, "version", str)) for span in spans))
