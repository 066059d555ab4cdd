"""What a server sends that went mad: an answer to what was asked, or a typed error, and nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime.engines.api import parse_generate
from slime.engines.errors import EngineError
from slime.engines.scores import TopScores, score_triples, top_scores

VOCAB, TOKENS, TOP_K = 100, [11, 12, 2], 2
GENERATED: dict[str, Any] = {
    "text": "so",
    "output_ids": TOKENS,
    "meta_info": {
        "id": "slime-1",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 5,
        "cached_tokens": 3,
        "weight_version": "3",
        "weight_versions": [{"version": "3", "start": 0, "end": 3}],
        "output_token_logprobs": [[-0.5, 11, None], [-0.25, 12, None], [-1.0, 2, None]],
    },
}
SCORED: dict[str, Any] = {
    "text": "",
    "output_ids": [],
    "meta_info": {
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 8,
        "image_tokens": 4,
        "input_token_logprobs": [[None, 7, None], [-0.5, 11, None], [-0.25, 12, None], [-2.0, 2, None]],
        "input_top_logprobs": [
            None,
            [[-0.5, 11, None], [-1.5, 4, None]],
            [[-0.25, 12, None], [-2.5, 9, None]],
            [[-0.5, 8, None], [-2.0, 2, None]],
        ],
    },
}
FLAT: dict[str, Any] = copy.deepcopy(SCORED)
del FLAT["meta_info"]["input_top_logprobs"]
FLAT["meta_info"] |= {
    "input_top_logprobs_shape": [3, 2],
    "input_top_logprobs_val_flat": [-0.5, -1.5, -0.25, -2.5, -0.5, -2.0],
    "input_top_logprobs_idx_flat": [11, 4, 12, 9, 8, 2],
}
NESTED = "nested without end"
"""Stands for `DEEP`, which hypothesis could not show."""
DEEP: Any = orjson.loads("[" * 900 + "]" * 900)
VALUES = (
    st.sampled_from(
        [
            *(
                None,
                True,
                False,
                0,
                1,
                -1,
                11,
                12,
                11.0,
                2**31,
                2**63,
                10**400,
                -(10**400),
                1.7,
                -0.5,
                0.5,
                1e300,
            ),
            *(
                float("nan"),
                float("inf"),
                -float("inf"),
                "",
                "-0.5",
                "11",
                [],
                {},
                [[]],
                NESTED,
                {"type": "abort"},
            ),
        ]
    )
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.lists(st.integers(-2, 101) | st.floats() | st.booleans() | st.none(), max_size=4)
)
EDIT = st.tuples(st.integers(0, 10_000), st.sampled_from(["set", "drop", "double"]), VALUES)
EDITS = st.lists(EDIT, min_size=1, max_size=3)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in _places(below, (*path, key)))]


def _edited(answer: Any, edits: list[tuple[int, str, Any]]) -> Any:
    answer = copy.deepcopy(answer)
    for number, how, value in edits:
        places = [place for place in _places(answer) if len(place) < 8]
        place = places[number % len(places)]
        value = DEEP if value == NESTED else value
        if not place:
            return value
        parent = answer
        for key in place[:-1]:
            parent = parent[key]
        if how == "drop":
            del parent[place[-1]]
        elif how == "double" and isinstance(parent, list):
            parent.insert(place[-1], copy.deepcopy(parent[place[-1]]))
        else:
            parent[place[-1]] = value
        if _depth(answer) > 20:
            break
    return answer


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth < 25:
        level = [
            inner
            for entry in level
            if isinstance(entry, dict | list)
            for inner in (entry.values() if isinstance(entry, dict) else entry)
        ]
        depth += 1
    return depth


def _check_message(error: EngineError) -> None:
    assert 20 < len(str(error)) < 2_000


def _check_generated(answer: Any) -> None:
    try:
        parsed = parse_generate(answer, vocab_size=VOCAB)
    except EngineError as error:
        _check_message(error)
        return
    assert all(type(token) is int and 0 <= token < VOCAB for token in parsed.tokens)
    assert len(parsed.tokens) == len(parsed.log_probs)
    assert all(type(value) is float and -3.5e38 < value <= 1e-3 for value in parsed.log_probs)
    triples = answer["meta_info"]["output_token_logprobs"]
    for token, triple in zip(parsed.tokens, triples, strict=True):
        assert type(triple[1]) is int
        assert triple[1] == token or (triple[1] == 0 and token == VOCAB - 1)
        assert type(triple[0]) in (int, float)
    assert parsed.prompt_tokens >= 0 <= parsed.cached_tokens
    assert parsed.truncated is (answer["meta_info"]["finish_reason"]["type"] == "length")


def _read_scores(answer: Any) -> tuple[list[Any], TopScores]:
    triples = score_triples(answer, TOKENS, vocab_size=VOCAB, prompt_tokens=8, image_tokens=4)
    return triples, top_scores(answer, triples, TOP_K, vocab_size=VOCAB)


def _check_scored(answer: Any) -> None:
    try:
        triples, top = _read_scores(answer)
    except EngineError as error:
        _check_message(error)
        return
    assert [triple[1] for triple in triples[1:]] == TOKENS
    reported = answer["meta_info"]["input_token_logprobs"][-3:]
    assert all(type(entry[1]) is int for entry in reported)
    assert [entry[0] for entry in reported] == [triple[0] for triple in triples[1:]]
    assert all(type(entry[0]) in (int, float) and -3.5e38 < entry[0] <= 1e-3 for entry in reported)
    assert top.ids.shape == top.log_probs.shape == (3, TOP_K)
    assert top.ids.min() >= 0
    assert top.ids.max() < VOCAB
    assert np.isfinite(top.log_probs).all()
    assert ((top.tail_mass >= 0) & (top.tail_mass <= 1)).all()
    if "input_top_logprobs_shape" not in answer["meta_info"]:
        rows = answer["meta_info"]["input_top_logprobs"][-3:]
        assert all(type(entry[1]) is int for row in rows for entry in row)


CHECKS: list[tuple[Callable[[Any], None], Any]] = [
    (_check_generated, GENERATED),
    (_check_scored, SCORED),
    (_check_scored, FLAT),
]


def test_the_whole_answers_are_taken() -> None:
    assert parse_generate(GENERATED, vocab_size=VOCAB).log_probs == [-0.5, -0.25, -1.0]
    for answer in (SCORED, FLAT):
        assert _read_scores(answer)[1].ids.tolist() == [[11, 4], [12, 9], [8, 2]]


def _check(which: int, edits: list[tuple[int, str, Any]]) -> None:
    check, whole = CHECKS[which]
    check(_edited(whole, edits))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(which=st.integers(0, 2), edits=EDITS)
@example(which=0, edits=[(0, "set", NESTED)])
def test_any_answer_is_what_was_asked_for_or_a_typed_error(which: int, edits: list[Any]) -> None:
    _check(which, edits)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
@given(which=st.integers(0, 2), edits=EDITS)
def test_ten_thousand_answers_are_what_was_asked_for_or_typed_errors(which: int, edits: list[Any]) -> None:
    _check(which, edits)


def _with(answer: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(answer)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("output_ids",), [11, 12, -2]),
        (("output_ids",), [11, 12, 100]),
        (("meta_info", "output_token_logprobs", 0, 1), 11.0),
        (("meta_info", "output_token_logprobs", 0, 0), 0.5),
        (("meta_info", "output_token_logprobs", 0, 0), 10**400),
        (("meta_info", "output_token_logprobs", 0, 0), True),
        (("meta_info", "finish_reason", "type"), "whatever"),
        (("meta_info", "prompt_tokens"), -5),
        (("meta_info", "cached_tokens"), -1),
        (("text",), DEEP),
    ],
)
def test_found_answers_of_a_generation_are_refused(path: tuple[Any, ...], value: Any) -> None:
    answer = _with(GENERATED, path, value)
    if value in ([11, 12, -2], [11, 12, 100]):
        answer["meta_info"]["output_token_logprobs"][2][1] = value[2]
    with pytest.raises(EngineError):
        parse_generate(answer, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("meta_info", "input_token_logprobs", 1, 1), 11.0),
        (("meta_info", "input_top_logprobs", 1, 1, 1), 4.7),
        (("meta_info", "input_top_logprobs", 1, 1, 1), True),
        (("meta_info", "input_top_logprobs", 1, 1, 0), "-1.5"),
        (("meta_info", "input_top_logprobs_shape"), [-1, 2]),
        (("meta_info", "input_top_logprobs_shape"), [3, True]),
        (("meta_info", "input_top_logprobs_idx_flat", 1), 4.7),
        (("meta_info", "input_top_logprobs_val_flat", 1), "-1.5"),
        (("meta_info", "input_token_logprobs"), DEEP),
    ],
)
def test_found_answers_of_a_scoring_are_refused(path: tuple[Any, ...], value: Any) -> None:
    answer = _with(FLAT if "flat" in path[1] or "shape" in path[1] else SCORED, path, value)
    with pytest.raises(EngineError):
        _read_scores(answer)


def test_python_would_have_read_what_is_refused_here() -> None:
    """The pitfalls are real: numpy cuts, and reads text and truth."""
    assert np.asarray(json.loads("[4.7, true]"), np.int32).tolist() == [4, 1]
    assert np.asarray(["-1.5"], np.float32).tolist() == [-1.5]
