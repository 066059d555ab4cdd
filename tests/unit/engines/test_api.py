from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest

from slime.engines.api import (
    collapse_image_pads,
    generate_payload,
    parse_generate,
    sampling_params,
    score_payload,
)
from slime.engines.errors import (
    AnswerError,
    EngineAbortedError,
    HttpError,
    LengthMismatchError,
    MissingScoreError,
    PictureMismatchError,
    ScoreMismatchError,
    ShortScoresError,
    TokenMismatchError,
)
from slime.engines.scores import score_triples, top_scores
from tests.fakes.engine_server import FakeEngine, log_prob

PAD, VOCAB = 90, 100


def scored(tokens: list[int], start: int, fault: str | None = None) -> dict[str, Any]:
    engine = FakeEngine(image_token_id=PAD, vocab_size=VOCAB, fault=fault)
    return engine.answer(score_payload(tokens, start))


def test_a_score_holds_a_placeholder_and_one_number_a_response_token() -> None:
    tokens = [5, 6, 7, 8, 9]
    triples = score_triples(scored(tokens, 2), tokens[3:], vocab_size=VOCAB, prompt_tokens=5)
    assert triples == [(None, 7, None), (log_prob(8, 3), 8, None), (log_prob(9, 4), 9, None)]


def test_scores_are_read_from_the_end_whatever_the_start() -> None:
    tokens = [5, 6, 7, 8, 9]
    assert score_triples(scored(tokens, 0), tokens[3:]) == score_triples(scored(tokens, 2), tokens[3:])


def test_an_empty_response_has_the_placeholder_alone() -> None:
    assert score_triples(scored([5, 6, 7], 2), []) == [(None, 7, None)]


def test_the_last_id_is_reported_as_zero_and_is_allowed_for() -> None:
    tokens = [5, 6, VOCAB - 1, 8]
    triples = score_triples(scored(tokens, 1), tokens[2:], vocab_size=VOCAB)
    assert [triple[1] for triple in triples] == [6, VOCAB - 1, 8]
    with pytest.raises(TokenMismatchError, match="position"):
        score_triples(scored(tokens, 1), tokens[2:])


def test_a_thousand_good_answers_pass() -> None:
    rng = random.Random(0)
    ids = [token for token in range(VOCAB) if token != PAD]
    for _ in range(1000):
        prompt = rng.choices(ids, k=rng.randrange(1, 40))
        response = rng.choices(ids, k=rng.randrange(0, 40))
        start = rng.randrange(len(prompt))
        answer = scored(prompt + response, start)
        triples = score_triples(answer, response, vocab_size=VOCAB, prompt_tokens=len(prompt) + len(response))
        assert len(triples) == len(response) + 1


@pytest.mark.parametrize(
    ("fault", "error", "names"),
    [
        ("shift", TokenMismatchError, "sampled"),
        ("retokenise", TokenMismatchError, "differ"),
        ("clip", TokenMismatchError, "scored 0"),
        ("other", TokenMismatchError, "differ"),
        ("short", ShortScoresError, "scored positions"),
        ("null", MissingScoreError, "response token 4"),
        ("nan", MissingScoreError, "nan"),
        ("abort", EngineAbortedError, "waiting queue"),
    ],
)
def test_a_score_that_is_not_for_these_tokens_is_an_error(
    fault: str, error: type[Exception], names: str
) -> None:
    tokens = list(range(10, 20))
    with pytest.raises(error, match=names):
        score_triples(scored(tokens, 4, fault), tokens[5:], vocab_size=VOCAB)


def test_a_picture_that_did_not_arrive_is_an_error() -> None:
    tokens = [5, PAD, 7, 8]
    with pytest.raises(LengthMismatchError, match="prompt_tokens = 4 and we count 9"):
        score_triples(scored(tokens, 2), tokens[3:], vocab_size=VOCAB, prompt_tokens=9)
    with pytest.raises(PictureMismatchError, match="image_tokens"):
        score_triples(scored(tokens, 2), tokens[3:], vocab_size=VOCAB, prompt_tokens=4, image_tokens=6)


def generated(**changes: Any) -> dict[str, Any]:
    engine = FakeEngine(image_token_id=PAD, vocab_size=VOCAB, responses=[[11, VOCAB - 1, 2]])
    answer = engine.answer(generate_payload([5, 6], sampling_params(max_new_tokens=8)))
    answer["meta_info"] |= changes
    return answer


def test_sampled_ids_are_taken_from_output_ids() -> None:
    answer = parse_generate(generated(), vocab_size=VOCAB)
    assert answer.tokens == [11, VOCAB - 1, 2]
    assert answer.log_probs == [log_prob(token, 2 + place) for place, token in enumerate(answer.tokens)]
    assert (answer.truncated, answer.prompt_tokens, answer.weight_versions) == (False, 2, ["default"])


def test_versions_are_listed_in_order_without_repetition() -> None:
    spans = [{"version": version, "start": 0, "end": 1} for version in ("3", "4", "4")]
    assert parse_generate(generated(weight_versions=spans), vocab_size=VOCAB).weight_versions == ["3", "4"]


def test_a_token_limit_is_truncation() -> None:
    answer = parse_generate(generated(finish_reason={"type": "length", "length": 3}), vocab_size=VOCAB)
    assert answer.truncated


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"finish_reason": {"type": "abort", "message": "gone"}}, EngineAbortedError),
        ({"finish_reason": {"type": "stop", "matched": "NaN happened"}}, AnswerError),
        ({"finish_reason": None}, AnswerError),
        ({"output_token_logprobs": [[-1.0, 11, None]]}, AnswerError),
        ({"output_token_logprobs": [[-1.0, 12, None], [-1.0, 0, None], [-1.0, 2, None]]}, AnswerError),
        ({"output_token_logprobs": [[None, 11, None], [-1.0, 0, None], [-1.0, 2, None]]}, AnswerError),
        ({"output_token_logprobs": "none"}, AnswerError),
        ({"prompt_tokens": "2"}, AnswerError),
    ],
)
def test_a_malformed_answer_is_an_error(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        parse_generate(generated(**changes), vocab_size=VOCAB)


@pytest.mark.parametrize("answer", [None, [], "text", {}, {"meta_info": None}, [{"meta_info": {}}]])
def test_what_is_no_answer_is_an_error(answer: Any) -> None:
    with pytest.raises(AnswerError):
        parse_generate(answer)
    with pytest.raises(AnswerError):
        score_triples(answer, [1])


def test_a_run_of_pads_becomes_one() -> None:
    tokens = [1, PAD, PAD, PAD, 2, 2, PAD, 3]
    assert collapse_image_pads(tokens, PAD) == [1, PAD, 2, 2, PAD, 3]
    assert collapse_image_pads([1, PAD, 2], PAD) == [1, PAD, 2]


def test_payloads_hold_ids_verbatim_and_images_flat() -> None:
    tokens = [1, PAD, 2]
    payload = score_payload(tokens, 2, ["data:a", "data:b"])
    assert payload["input_ids"] == tokens
    assert payload["image_data"] == ["data:a", "data:b"]
    assert payload["sampling_params"] == {"max_new_tokens": 0}
    assert payload["logprob_start_len"] == 2
    assert "image_data" not in score_payload(tokens, 0)


def test_a_start_that_kills_the_server_is_refused() -> None:
    with pytest.raises(ValueError, match="logprob_start_len is -2"):
        score_payload([1, 2], -2)


def test_banned_ids_are_a_finite_bias() -> None:
    params = sampling_params(max_new_tokens=5, banned_ids=(7, 8), stop=("x",), stop_token_ids=(2,))
    assert params["logit_bias"] == {"7": -1.0e5, "8": -1.0e5}
    assert (params["stop"], params["stop_token_ids"], params["temperature"]) == (["x"], [2], 1.0)
    assert "logit_bias" not in sampling_params(max_new_tokens=5)


def test_an_http_error_survives_a_trip_through_ray() -> None:
    error = HttpError("http://x/generate", 500, "Internal Server Error", "Look at the log.")
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.status, back.url) == (str(error), 500, error.url)
    assert copy.copy(error).body == error.body


def hostile(**changes: Any) -> dict[str, Any]:
    answer = scored([5, 6, 7, 8, 9], 2)
    answer["meta_info"] |= changes
    return answer


@pytest.mark.parametrize(
    "values",
    [
        [1e308, 1e308],
        [-1e39, -1.0],
        [5.0, -1.0],
        [True, -1.0],
        ["-1", -1.0],
        [float("nan"), -1.0],
        [None, -1.0],
    ],
)
def test_what_is_no_log_prob_is_refused(values: list[Any]) -> None:
    triples = [[None, 7, None], [values[0], 8, None], [values[1], 9, None]]
    with pytest.raises(AnswerError):
        score_triples(hostile(input_token_logprobs=triples), [8, 9])


@pytest.mark.parametrize(
    "top",
    [
        {"input_top_logprobs": []},
        {"input_top_logprobs": [None]},
        {"input_top_logprobs": [None, [[-1.0, 8]], [[-1.0, 2**63]]]},
        {"input_top_logprobs": [None, [[-1.0, 8]], [[-1.0, 1e308]]]},
        {"input_top_logprobs": [None, [[-1.0, 8]], 3]},
        {"input_top_logprobs_shape": [2, 1, 1], "input_top_logprobs_val_flat": [-1.0, -1.0]},
        {"input_top_logprobs_shape": [2], "input_top_logprobs_val_flat": [-1.0, -1.0]},
        {"input_top_logprobs_shape": [2, 1], "input_top_logprobs_val_flat_b64": "no base64"},
        {
            "input_top_logprobs_shape": [2, 1],
            "input_top_logprobs_val_flat": [-1.0, -1.0],
            "input_top_logprobs_idx_flat": [8, 2**40],
        },
    ],
)
def test_what_is_no_top_k_is_refused(top: dict[str, Any]) -> None:
    triples = [(None, 7, None), (-1.0, 8, None), (-1.0, 9, None)]
    with pytest.raises((AnswerError, ScoreMismatchError)):
        top_scores(hostile(**top), triples, 1, vocab_size=VOCAB)


@pytest.mark.parametrize("ids", [[[77, 9], [5, 4]], [[8, 2], [-4, 9]], [[8, 2], [9, VOCAB]]])
def test_top_k_ids_are_held_against_the_sampled_tokens(ids: list[list[int]]) -> None:
    triples = [(None, 7, None), (-0.5, 8, None), (-0.5, 9, None)]
    rows = [[[-0.5, row[0], None], [-2.0, row[1], None]] for row in ids]
    with pytest.raises((AnswerError, ScoreMismatchError)):
        top_scores(hostile(input_top_logprobs=[None, *rows]), triples, 2, vocab_size=VOCAB)


def test_a_sampled_last_id_gets_its_name_back_in_the_top_k() -> None:
    triples = [(None, 7, None), (-0.5, VOCAB - 1, None)]
    answer = hostile(input_top_logprobs=[None, [[-0.5, 0, None], [-2.0, 4, None]]])
    assert top_scores(answer, triples, 2, vocab_size=VOCAB).ids.tolist() == [[VOCAB - 1, 4]]


@pytest.mark.parametrize(
    "changes",
    [{"weight_versions": "a"}, {"weight_versions": True}, {"weight_versions": [1]}, {"cached_tokens": "x"}],
)
def test_odd_versions_and_counts_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AnswerError):
        parse_generate(generated(**changes), vocab_size=VOCAB)
