"""What `/generate` answers to a scoring request: the receipt of its tokens, their log-probs, the top-k.

The half of the wire (`api.py`) that reads scores. Shape letters: R response tokens, K teacher top-k.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from slime.engines.api import (
    LOWEST,
    ROUNDING,
    Triple,
    count,
    field,
    finish_type,
    log_prob,
    meta_info,
    same_id,
)
from slime.engines.errors import (
    AnswerError,
    LengthMismatchError,
    MissingScoreError,
    PictureMismatchError,
    ScoreMismatchError,
    ShortScoresError,
    TokenMismatchError,
    excerpt,
)


def score_triples(
    answer: Any,
    response_tokens: Sequence[int],
    *,
    vocab_size: int | None = None,
    prompt_tokens: int | None = None,
    image_tokens: int | None = None,
) -> list[Triple]:
    """Return the last R + 1 triples of a scored sequence, the first a placeholder, after checking the token
    receipt.

    The ids that come back for the last R positions must be the R sampled ids. SGLang reports ids from
    `vocab_size - 1` on as 0; that is allowed for where `vocab_size` is given. With R = 0 the placeholder
    alone is left.

    Args:
        answer: what `/generate` answered to `score_payload`.
        response_tokens: [R], the sampled ids.
        vocab_size: of the model that scores.
        prompt_tokens: our own count of the expanded sequence, response included; None where it is unknown.
        image_tokens: our own count of expanded image pads; None where it is unknown.

    Raises:
        EngineAbortedError: the server cut the request off.
        MissingScoreError: a log-prob is null or no number.
        AnswerError: the answer is malformed.
        PictureMismatchError: a picture did not arrive as it was sent.
        LengthMismatchError: the server read another number of tokens.
        ShortScoresError: there are fewer than R + 1 scored positions.
        TokenMismatchError: other ids were scored than were sampled.
    """
    meta = meta_info(answer)
    finish_type(meta)
    _check_counts(meta, prompt_tokens, image_tokens)
    triples = field(meta, "input_token_logprobs", list)
    wanted = len(response_tokens) + 1
    if len(triples) < wanted:
        raise ShortScoresError(
            f"the answer holds {len(triples)} scored positions; {wanted - 1} response tokens and a "
            "placeholder were asked for. Does the server truncate long inputs (--allow-auto-truncate)?"
        )
    values, ids = _columns(triples[len(triples) - wanted :])
    placeholder = ids.pop(0)
    del values[0]
    _require_numbers(values)
    _compare(ids, response_tokens, vocab_size)
    # tuples of numbers, which the garbage collector forgets at first sight; it walks lists for ever
    return [(None, placeholder, None), *zip(values, response_tokens, repeat(None), strict=False)]


def _columns(triples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return log-probs and ids; thousands a sample, so it is one plain pass."""
    try:
        return [triple[0] for triple in triples], [triple[1] for triple in triples]
    except (TypeError, IndexError, KeyError) as error:
        bad = next(triple for triple in triples if not isinstance(triple, list | tuple) or len(triple) < 2)
        raise AnswerError(
            f"`input_token_logprobs` holds {excerpt(bad, 100)!r}; [log-prob, token id, text] is needed."
        ) from error


def _require_numbers(values: Sequence[Any]) -> None:
    """Check the log-probs of the response in a few plain passes; NaN is in no order, and fails the last."""
    if (
        set(map(type, values)) <= {float}
        and all(map(LOWEST.__lt__, values))
        and max(values, default=0.0) <= ROUNDING
    ):
        return
    for position, value in enumerate(values):
        log_prob(value, f"log-prob of response token {position}")


def _check_counts(meta: Mapping[str, Any], prompt_tokens: int | None, image_tokens: int | None) -> None:
    """Compare the server's counts with ours. The picture first: without it the length is wrong as well."""
    if image_tokens and "image_tokens" in meta and meta["image_tokens"] != image_tokens:
        raise PictureMismatchError(
            f"the server counts image_tokens = {excerpt(meta['image_tokens'])} and we count {image_tokens}: "
            "the picture did not arrive, or its processor resizes it otherwise than ours. Compare both "
            "checkpoints' preprocessor_config.json."
        )
    reported = count(meta, "prompt_tokens")
    if prompt_tokens is None or reported == prompt_tokens:
        return
    error = PictureMismatchError if image_tokens else LengthMismatchError
    raise error(
        f"the server counts prompt_tokens = {reported} and we count {prompt_tokens}: it truncates or "
        "re-tokenises the input"
        + (", or a picture did not arrive at our grid." if image_tokens else ".")
        + " It must keep `input_ids` verbatim."
    )


def check_receipt(triples: Sequence[Triple], tokens: Sequence[int], vocab_size: int | None = None) -> None:
    """Compare the ids of scored positions [R] with the sampled ids [R], and look at their log-probs.

    Raises:
        MissingScoreError: a log-prob is null or no number.
        TokenMismatchError: they differ; the first difference is named.
        ShortScoresError: there are more of one than of the other.
    """
    values, ids = _columns(triples)
    _compare(ids, tokens, vocab_size)
    _require_numbers(values)


def _compare(ids: Sequence[Any], tokens: Sequence[int], vocab_size: int | None) -> None:
    if len(ids) != len(tokens):
        raise ShortScoresError(f"{len(ids)} positions were scored and {len(tokens)} tokens were sampled.")
    if ids == tokens and set(map(type, ids)) <= {int}:
        return
    pairs = enumerate(zip(ids, tokens, strict=True))
    wrong = [place for place, (reported, token) in pairs if not same_id(token, reported, vocab_size)]
    if wrong:
        first = wrong[0]
        raise TokenMismatchError(
            f"the ids that were scored are not the sampled ids: {len(wrong)} of {len(tokens)} response "
            f"positions differ, the first at {first} (sampled {tokens[first]}, scored {ids[first]}). "
            "The server re-tokenised, shifted or mixed up the input; its version must keep `input_ids` "
            "verbatim beside `image_data`."
        )


@dataclass(frozen=True, slots=True)
class TopScores:
    """The likeliest tokens at each response position, likeliest first."""

    ids: npt.NDArray[np.int32]
    """[R, K]."""
    log_probs: npt.NDArray[np.float32]
    """[R, K]."""
    tail_mass: npt.NDArray[np.float32]
    """[R], the probability of all other tokens."""

    @classmethod
    def empty(cls, top_k: int) -> TopScores:
        """Return those of an empty response."""
        return cls(np.empty((0, top_k), np.int32), np.empty((0, top_k), np.float32), np.empty(0, np.float32))


def top_scores(
    answer: Any, triples: Sequence[Triple], top_k: int, *, vocab_size: int | None = None
) -> TopScores:
    """Read the top-k of the last R positions, in the base64, the flat or the long form.

    Args:
        answer: what `/generate` answered.
        triples: what `score_triples` made of it, R + 1; the rows are held against the sampled tokens.
        top_k: K, as it was asked for.
        vocab_size: of the model that scores.

    Raises:
        AnswerError: there are none, they cannot be read, or they are no log-probs of this vocabulary.
        ShortScoresError: there are fewer than R rows.
        ScoreMismatchError: the rows do not belong to the sampled tokens' positions.
    """
    meta = meta_info(answer)
    response_length = len(triples) - 1
    form = "input_top_logprobs"
    if f"{form}_shape" in meta:
        values, ids = _flat_rows(meta, form, "val", np.float32), _flat_rows(meta, form, "idx", np.int32)
    elif form in meta:
        values, ids = _long_rows(field(meta, form, list), response_length)
    else:
        raise AnswerError(
            f"the teacher's top-{top_k} was asked for and the answer has no `{form}`; the server is too old "
            "for top_logprobs_num, or something between drops it. Leave --opd-top-k away or update it."
        )
    if len(values) < response_length or values.shape != ids.shape or values.shape[1:] != (top_k,):
        raise ShortScoresError(
            f"the teacher's top-{top_k} has the shapes {values.shape} and {ids.shape} for {response_length} "
            f"response tokens; [{response_length}, {top_k}] is needed."
        )
    rows = slice(len(values) - response_length, None)
    values, ids = values[rows], ids[rows]
    if not np.isfinite(values).all():
        raise MissingScoreError("the teacher's top-k holds numbers that are not finite.")
    ids = _named(values, ids, triples, vocab_size)
    return TopScores(ids, values, _tail_mass(values))


def _named(
    values: npt.NDArray[Any], ids: npt.NDArray[np.int32], triples: Sequence[Triple], vocab_size: int | None
) -> npt.NDArray[np.int32]:
    """Hold the rows against the sampled tokens and return their ids.

    No sampled token is likelier than its row's first, and one that is likelier than its row's last is in the
    row, under its id. Where that is the last id, which servers report as 0, the row gets it back; a last id
    that was not sampled stays a 0.
    """
    if ids.size and (ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size)):
        raise AnswerError(
            f"the teacher's top-k names ids from {ids.min()} to {ids.max()}; its vocabulary has {vocab_size}."
        )
    sampled = np.asarray([triple[0] for triple in triples[1:]])[:, None]
    tokens = np.asarray([triple[1] for triple in triples[1:]], ids.dtype)[:, None]
    unnamed = (ids == 0) & (tokens >= (vocab_size or np.inf) - 1)
    own = (np.abs(values - sampled) <= ROUNDING) & ((ids == tokens) | unnamed)
    inside = sampled[:, 0] > values[:, -1] + ROUNDING
    wrong = np.flatnonzero((sampled[:, 0] > values[:, 0] + ROUNDING) | (inside & ~own.any(axis=1)))
    if wrong.size:
        raise ScoreMismatchError(
            f"the teacher's top-k does not belong to the sampled tokens: at {wrong.size} of {len(sampled)} "
            f"positions, the first {int(wrong[0])}, the sampled token (log-prob {sampled[wrong[0], 0]:.4f}) "
            f"is not in the row from {values[wrong[0], 0]:.4f} to {values[wrong[0], -1]:.4f} it must be in."
        )
    return _told_apart(np.where(own & unnamed, tokens, ids), vocab_size)


def _told_apart(ids: npt.NDArray[np.int32], vocab_size: int | None) -> npt.NDArray[np.int32]:
    """Return rows in which no id stands twice.

    A row with two zeros holds the last id, which servers report as 0 too: the less likely of the two is taken
    for it, since vocabularies end in rows that no token has.
    """
    if vocab_size is not None:
        zeros = ids == 0
        second = zeros & (zeros.cumsum(axis=1) == 2)
        ids = np.where(second, np.int32(vocab_size - 1), ids)
    ordered = np.sort(ids, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if twice.size:
        raise AnswerError(f"the teacher's top-k names a token twice, first at response position {twice[0]}.")
    return ids


def _tail_mass(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return one less the rows' mass. Rounding alone may bring that below 0."""
    tail = 1.0 - np.exp(values.astype(np.float64)).sum(axis=1)
    if (tail < -ROUNDING).any():
        raise AnswerError(
            f"the teacher's top-k probabilities of a position sum to {1 - tail.min():.4f}; at most 1 is "
            "possible, so these are no log-probs."
        )
    return tail.clip(min=0.0).astype(np.float32)


def _flat_rows(meta: Mapping[str, Any], form: str, part: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Return one of the two flat arrays as [rows, K]; rows are the positions behind the null prefix."""
    shape = field(meta, f"{form}_shape", list)
    if len(shape) != 2 or not set(map(type, shape)) <= {int} or min(shape) < 0:
        raise AnswerError(f"`{form}_shape` is {excerpt(shape)}; [rows, K] is needed.")
    try:
        if f"{form}_{part}_flat_b64" in meta:
            raw = base64.b64decode(meta[f"{form}_{part}_flat_b64"], validate=True)
            flat = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype)
        else:
            flat = _array(field(meta, f"{form}_{part}_flat", list), dtype)
        rows, width = shape
        return flat.reshape(rows, width)
    except (ValueError, TypeError, OverflowError, binascii.Error) as error:
        raise AnswerError(f"`{form}_{part}_flat` cannot be read as {shape}: {excerpt(str(error))}") from error


def _array(values: list[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Return numbers [N] of JSON as an array, which of itself would cut 1.7 to 1 and read text and `true`.

    Raises:
        TypeError: there is something else among them.
    """
    kinds = {int} if issubclass(dtype, np.integer) else {int, float}
    if not set(map(type, values)) <= kinds:
        raise TypeError("there are other things than numbers in it")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused as such
        return np.asarray(values, dtype)


def _long_rows(rows: list[Any], response_length: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return values and ids [R, K] of rows of triples."""
    if len(rows) < response_length:
        raise ShortScoresError(
            f"the teacher's top-k has {len(rows)} rows for {response_length} response tokens; one each is "
            "needed."
        )
    tail = rows[len(rows) - response_length :]
    try:
        width = len(tail[0]) if tail else 0
        if any(len(row) != width for row in tail):
            raise ValueError("its rows have different lengths")
        values = _array([triple[0] for row in tail for triple in row], np.float32)
        ids = _array([triple[1] for row in tail for triple in row], np.int32)
        return values.reshape(len(tail), width), ids.reshape(len(tail), width)
    except (TypeError, IndexError, KeyError, ValueError, OverflowError) as error:
        raise AnswerError(f"`input_top_logprobs` cannot be read: {excerpt(str(error))}") from error
