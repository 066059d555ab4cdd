"""Pausing, weight updates and versions, as the weight sync relies on them."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.engine_api.support import (
    MODEL,
    PROMPT,
    Engine,
    input_logprobs,
    picture_uri,
    running_request,
    save_changed_model,
)
from tests.fakes.processes import wait_until

SCORE = {
    "input_ids": PROMPT,
    "image_data": [picture_uri("first")],
    "sampling_params": {"max_new_tokens": 0},
    "return_logprob": True,
    "logprob_start_len": 0,
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkpoint of the same shape."""
    return save_changed_model(tmp_path_factory.mktemp("weights") / "changed")


@pytest.fixture
def at_original_weights(engine: Engine) -> Iterator[Engine]:
    """Give the engine back as it was."""
    yield engine
    engine.ask("POST", "/continue_generation", {})
    engine.post("/update_weights_from_disk", {"model_path": str(MODEL), "weight_version": "default"})


@pytest.mark.parametrize(
    "name",
    [
        "63_tensor_no_session", "67_dist_no_session", "65_end_no_session", "65_get_w", "65_get_w_bad",
        "67_destroy_again", "61_from_disk_nonexistent", "71_pause_bad",
    ],
)  # fmt: skip
def test_refusals_are_as_recorded(engine: Engine, exchanges: dict[str, Any], name: str) -> None:
    exchange = exchanges[name]
    status, answer = engine.ask("POST", exchange["path"], exchange["request"])
    assert status == exchange["status"]
    assert set(answer) == set(exchange["response"])
    assert answer.get("success") == exchange["response"].get("success")


def test_a_session_opens_once_and_closes(engine: Engine, exchanges: dict[str, Any]) -> None:
    for name in ("63_begin", "63_begin_again", "63_end"):
        exchange = exchanges[name]
        assert engine.ask("POST", exchange["path"], {}) == (exchange["status"], exchange["response"])


def test_an_update_changes_answers_and_version(at_original_weights: Engine, changed: Path) -> None:
    engine = at_original_weights
    before = engine.generate(**SCORE)
    answer = engine.post("/update_weights_from_disk", {"model_path": str(changed), "weight_version": "7"})
    assert answer == {
        "success": True,
        "message": "Succeeded to update model weights. Weight version updated to 7.",
        "num_paused_requests": 0,
    }
    after = engine.generate(**SCORE)
    assert after["meta_info"]["weight_version"] == "7"
    assert after["meta_info"]["weight_versions"] == [{"version": "7", "start": 0, "end": 0}]
    assert input_logprobs(after)[1:] != pytest.approx(input_logprobs(before)[1:], abs=0.05)
    info = engine.ask("GET", "/model_info")[1]
    assert (info["weight_version"], info["model_path"]) == ("7", str(changed))
    engine.post("/update_weights_from_disk", {"model_path": str(MODEL), "weight_version": "8"})
    again = engine.generate(**SCORE)
    assert input_logprobs(again)[1:] == pytest.approx(input_logprobs(before)[1:], abs=1e-4)


def test_broken_weights_leave_the_old_ones(own_engine: Engine, changed: Path, tmp_path: Path) -> None:
    before = own_engine.generate(**SCORE)
    broken = tmp_path / "broken"
    shutil.copytree(changed, broken)
    whole = (changed / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for path in (broken, tmp_path / "nowhere"):
        status, answer = own_engine.ask(
            "POST", "/update_weights_from_disk", {"model_path": str(path), "weight_version": "bad"}
        )
        assert status == 400
        assert answer["success"] is False
        assert str(path) in answer["message"]
    after = own_engine.generate(**SCORE)
    assert after["meta_info"]["weight_version"] == before["meta_info"]["weight_version"]
    assert input_logprobs(after) == input_logprobs(before)


def test_a_version_can_be_renamed(at_original_weights: Engine, exchanges: dict[str, Any]) -> None:
    exchange = exchanges["68_version"]
    answer = at_original_weights.ask("POST", exchange["path"], exchange["request"])
    assert answer == (exchange["status"], exchange["response"])
    assert at_original_weights.generate(**SCORE)["meta_info"]["weight_version"] == "manual"


def test_requests_wait_while_paused(at_original_weights: Engine, exchanges: dict[str, Any]) -> None:
    engine = at_original_weights
    pause = exchanges["70_pause_retract"]
    assert engine.ask("POST", pause["path"], pause["request"]) == (pause["status"], pause["response"])
    assert engine.ask("GET", "/ready")[0] == 503
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.generate, **SCORE)
        if engine.kind == "transformers":
            wait_until(lambda: engine.held() == 1, "the request is there")
        # Of another server, which does not tell, a request that has not come yet is not answered either.
        with pytest.raises(FutureTimeoutError):
            asked.result(1.0)
        flush = exchanges["70_flush_paused_retract"]
        assert engine.ask("POST", flush["path"], flush["request"]) == (flush["status"], flush["response"])
        go_on = exchanges["70_continue_retract"]
        assert engine.ask("POST", go_on["path"], go_on["request"]) == (go_on["status"], go_on["response"])
        assert asked.result(60)["meta_info"]["prompt_tokens"] == len(PROMPT) + 5
    assert engine.ask("GET", "/ready")[0] == 200


def test_health_says_that_generation_is_paused(own_engine: Engine) -> None:
    own_engine.post("/pause_generation", {})
    try:
        assert own_engine.ask("GET", "/health")[0] == 503
    finally:
        own_engine.post("/continue_generation", {})
    assert own_engine.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_response_over_an_update_names_both_versions(
    at_original_weights: Engine, changed: Path, mode: str
) -> None:
    engine = at_original_weights
    with running_request(engine, f"over-an-update-{mode}", return_logprob=True) as request:
        engine.post("/pause_generation", {"mode": mode})
        update = {"model_path": str(changed), "weight_version": "next", "flush_cache": mode == "retract"}
        engine.post("/update_weights_from_disk", update)
        engine.post("/continue_generation", {})
        request.go_on()
        meta = request.abort()["meta_info"]
    old, new = meta["weight_versions"]
    assert (old["version"], new["version"]) == ("default", "next")
    assert old["start"] == 0 < old["end"] == new["start"] < new["end"] == meta["completion_tokens"]
    assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
    assert meta["num_retractions"] == (mode == "retract")
    assert meta["weight_version"] == "next"


def test_pausing_by_abort_ends_what_runs(engine: Engine) -> None:
    with running_request(engine, "paused-by-abort") as request:
        engine.post("/pause_generation", {"mode": "abort"})
        answer = request.wait_end()
        engine.post("/continue_generation", {})
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"


def test_what_only_sglang_can_do_is_refused_with_a_reason(own_engine: Engine) -> None:
    status, answer = own_engine.ask("POST", "/weights_checker", {})
    assert status == 400
    assert answer["success"] is False
    assert "transformers engine" in answer["message"]


def test_control_needs_the_admin_key(own_engine: Engine) -> None:
    stranger = Engine(own_engine.kind, own_engine.url, None)
    assert stranger.ask("POST", "/pause_generation", {}) == (401, {"error": "Unauthorized"})
    assert stranger.ask("GET", "/health")[0] == 200
    assert stranger.ask("POST", "/generate", SCORE)[0] == 200
