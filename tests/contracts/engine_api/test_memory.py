"""Memory given back and taken again. The real server does not survive this on a CPU: our engine alone."""

from collections.abc import Iterator
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.contracts.engine_api.support import (
    MODEL,
    PROMPT,
    Engine,
    input_logprobs,
    picture_uri,
    running_request,
)
from tests.fakes.weight_senders import payload

SCORE = {
    "input_ids": PROMPT,
    "image_data": [picture_uri("first")],
    "sampling_params": {"max_new_tokens": 0},
    "return_logprob": True,
    "logprob_start_len": 0,
}
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


@pytest.fixture
def engine_given_back(own_engine: Engine) -> Iterator[Engine]:
    """Our engine, served as it was afterwards."""
    yield own_engine
    for tag in ("kv_cache", "weights", "cuda_graph"):
        own_engine.ask("POST", RESUME, {"tags": [tag]})
    own_engine.ask("POST", "/continue_generation", {})
    own_engine.post("/update_weights_from_disk", {"model_path": str(MODEL), "weight_version": "default"})


def send_original(engine: Engine) -> None:
    engine.post("/begin_weight_update", {})
    with payload(load_file(MODEL / "model.safetensors")) as given:
        engine.post("/update_weights_from_tensor", {"serialized_named_tensors": [given]})
    engine.post("/end_weight_update", {})


def refusal(engine: Engine, path: str, body: Any) -> str:
    status, answer = engine.ask("POST", path, body)
    assert (status, answer["success"]) == (400, False)
    return answer["message"]


@pytest.mark.parametrize("paused", [False, True])
def test_an_engine_comes_back_with_the_weights_it_is_sent(engine_given_back: Engine, paused: bool) -> None:
    engine = engine_given_back
    before = input_logprobs(engine.generate(**SCORE))
    if paused:
        engine.post("/pause_generation", {"mode": "retract"})
    assert engine.ask("POST", RELEASE, {}) == (200, None)
    for path in ("/health_generate", "/health", "/ready"):
        assert engine.ask("GET", path)[0] == 503
    if paused:
        engine.post("/continue_generation", {})
    status, answer = engine.ask("POST", "/generate", SCORE)
    assert status == 503
    assert "kv_cache and weights is released" in answer["message"]
    message = refusal(engine, "/update_weights_from_disk", {"model_path": str(MODEL)})
    assert "/resume_memory_occupation" in message

    assert engine.ask("POST", RESUME, {"tags": ["weights", "cuda_graph"]}) == (200, None)
    send_original(engine)
    assert "kv_cache is released" in engine.ask("POST", "/generate", SCORE)[1]["message"]
    assert engine.ask("POST", RESUME, {"tags": ["kv_cache"]}) == (200, None)
    assert engine.ask("GET", "/health_generate")[0] == 200
    assert input_logprobs(engine.generate(**SCORE)) == before


def test_weights_without_values_serve_nothing(engine_given_back: Engine) -> None:
    engine = engine_given_back
    engine.post(RELEASE, {"tags": ["weights"]})
    engine.post(RESUME, {"tags": ["weights"]})
    status, answer = engine.ask("POST", "/generate", SCORE)
    assert status == 503
    assert "70 weights have no values" in answer["message"]
    engine.post("/update_weights_from_disk", {"model_path": str(MODEL)})
    assert engine.ask("POST", "/generate", SCORE)[0] == 200


def test_a_wrong_order_is_refused(engine_given_back: Engine) -> None:
    engine = engine_given_back
    assert "kv_cache, weights, cuda_graph was not released" in refusal(engine, RESUME, {})
    assert "teapot" in refusal(engine, RELEASE, {"tags": ["teapot"]})
    engine.post(RELEASE, {"tags": ["kv_cache"]})
    assert "kv_cache is released already" in refusal(engine, RELEASE, {"tags": ["kv_cache", "weights"]})
    assert "weights was not released" in refusal(engine, RESUME, {"tags": ["weights", "kv_cache"]})
    engine.post(RESUME, {"tags": ["kv_cache"]})
    assert engine.ask("POST", "/generate", SCORE)[0] == 200


@pytest.mark.parametrize("mode", [None, "in_place"])
def test_running_requests_keep_their_memory(engine_given_back: Engine, mode: str | None) -> None:
    engine = engine_given_back
    with running_request(engine, "keeps-its-memory") as request:
        if mode is not None:
            engine.post("/pause_generation", {"mode": mode})
        assert "1 requests are" in refusal(engine, RELEASE, {})
        engine.post("/continue_generation", {})
        request.go_on()
        answer = request.abort()
    assert answer["meta_info"]["num_retractions"] == 0


def test_retracted_requests_outlive_a_release(engine_given_back: Engine) -> None:
    engine = engine_given_back
    with running_request(engine, "outlives-a-release") as request:
        engine.post("/pause_generation", {"mode": "retract"})
        engine.post(RELEASE, {})
        engine.post("/continue_generation", {})
        assert (engine.load(), request.ended) == ((0, 1), False)
        engine.post(RESUME, {"tags": ["weights", "cuda_graph"]})
        send_original(engine)
        assert (engine.load(), request.ended) == ((0, 1), False)
        engine.post(RESUME, {"tags": ["kv_cache"]})
        request.go_on()
        answer = request.abort()
    assert answer["meta_info"]["num_retractions"] == 1
