"""Real requests and a real server's answers, replayed: same status, keys, shapes and log-probs."""

from typing import Any

import pytest

from tests.contracts.engine_api.support import Engine, load_exchanges

TOLERANCE = 1e-3
RESIZED_TOLERANCE = 1e-2
"""For a picture that is scaled up, which the recording server did with another resampler."""
VOLATILE = {"id", "e2e_latency", "response_sent_to_client_ts", "cached_tokens", "cached_tokens_details"}
ABOUT_OUTPUT = {"output_token_logprobs_length", "completion_tokens", "weight_versions", "finish_reason"}
SERVER_DIED = -1
EXCHANGES = load_exchanges()
GENERATE = [name for name, e in EXCHANGES.items() if e["path"] == "/generate" and not name.startswith("70")]


@pytest.mark.parametrize("name", GENERATE)
def test_generate_answers_as_recorded(engine: Engine, name: str) -> None:
    exchange = EXCHANGES[name]
    if exchange["status"] == SERVER_DIED and engine.kind != "transformers":
        pytest.skip("kills a real server")
    status, answer = engine.ask("POST", "/generate", exchange["request"])
    if exchange["status"] == SERVER_DIED:
        assert status == 400
        assert answer["error"]["message"]
        return
    assert status == exchange["status"], answer
    tolerance = RESIZED_TOLERANCE if name == "47_tiny_img_8x8" else TOLERANCE
    compare(answer, exchange["response"], tolerance)


@pytest.mark.parametrize(
    "name", ["00_model_info", "00_v1_models", "00_health", "00_health_generate", "00_ready"]
)
def test_information_has_the_recorded_keys(engine: Engine, name: str) -> None:
    exchange = EXCHANGES[name]
    status, answer = engine.ask("GET", exchange["path"])
    assert status == exchange["status"]
    if isinstance(answer, dict):
        assert set(exchange["response"]) <= set(answer)
        assert {k: type(v) for k, v in exchange["response"].items()} == {
            k: type(answer[k]) for k in exchange["response"]
        }


def compare(answer: Any, recorded: Any, tolerance: float) -> None:
    """Assert that an answer has the recorded form, and the recorded numbers where they are not random."""
    if isinstance(recorded, list):
        assert len(answer) == len(recorded)
        for item, recorded_item in zip(answer, recorded, strict=True):
            compare(item, recorded_item, tolerance)
    elif isinstance(recorded, dict) and "meta_info" in recorded:
        assert set(answer) == set(recorded)
        compare_meta(answer["meta_info"], recorded["meta_info"], tolerance)
    elif isinstance(recorded, dict):
        assert shape_of(answer) == shape_of(recorded)
    elif recorded.startswith("data:"):
        # a busy server puts several tokens into one event
        assert {line[:5] for line in answer.splitlines()} == {line[:5] for line in recorded.splitlines()}
        assert answer.rstrip().endswith("data: [DONE]")
    else:
        assert answer == recorded


def compare_meta(meta: dict[str, Any], recorded: dict[str, Any], tolerance: float) -> None:
    """Compare `meta_info`; generated tokens are random, so only their number's consistency counts."""
    assert set(meta) == set(recorded)
    generated = recorded["completion_tokens"] > 0
    for key in set(recorded) - VOLATILE:
        about_output = key in ABOUT_OUTPUT or key.startswith("output_")
        if key == "output_token_logprobs":
            assert len(meta[key]) == meta["completion_tokens"] == meta["output_token_logprobs_length"]
        elif "logprobs" in key and not (generated and about_output):
            compare_numbers(meta[key], recorded[key], tolerance)
        elif not (generated and about_output):
            assert meta[key] == recorded[key], key


def compare_numbers(values: Any, recorded: Any, tolerance: float) -> None:
    """Compare nested lists: lengths, nulls and ids exactly, log-probs within the tolerance."""
    if isinstance(recorded, list):
        assert len(values) == len(recorded)
        for value, recorded_value in zip(values, recorded, strict=True):
            compare_numbers(value, recorded_value, tolerance)
    elif isinstance(recorded, float):
        assert values == pytest.approx(recorded, abs=tolerance)
    else:
        assert values == recorded


def shape_of(value: Any) -> Any:
    """Return keys and types of an error's body; its words may differ."""
    return {key: shape_of(item) for key, item in value.items()} if isinstance(value, dict) else type(value)
