"""Weights sent by a running trainer: out of its memory, or over a process group. What is sent is served."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from slime.engines.process import free_port
from slime.weight_sync.distributed import join_as_first
from tests.contracts.engine_api.support import (
    MODEL,
    PICTURES,
    PROMPT,
    TEXT_PROMPT,
    Engine,
    input_logprobs,
    picture_uri,
    running_request,
    save_changed_model,
)
from tests.contracts.reference import TOLERANCE, Reference
from tests.fakes.weight_senders import broadcast, described, payload, pickled

SCORE = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
TEXT = {"input_ids": TEXT_PROMPT, **SCORE}
PICTURE = {"input_ids": PROMPT, "image_data": [picture_uri("first")], **SCORE}
AFTER_PICTURE = len(PROMPT) - 6
"""Tokens behind the picture and its end."""
NAME = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another checkpoint of the same shape."""
    return save_changed_model(tmp_path_factory.mktemp("online") / "changed")


@pytest.fixture(scope="module")
def weights(changed: Path) -> dict[str, Tensor]:
    """What is sent: the tensors of that checkpoint."""
    return load_file(changed / "model.safetensors")


@pytest.fixture(scope="module")
def expected(changed: Path) -> Tensor:
    """What transformers says of them: log-probs of the text, then of what follows the picture."""
    reference = Reference(changed)
    picture = Image.open(PICTURES / "first.png").convert("RGB")
    text = reference.log_probs(TEXT_PROMPT, [], len(TEXT_PROMPT) - 1)
    return torch.cat([text, reference.log_probs(PROMPT, [picture], AFTER_PICTURE)])


def scores(engine: Engine) -> Tensor:
    """Ask for the same log-probs."""
    text, picture = (input_logprobs(engine.generate(**body)) for body in (TEXT, PICTURE))
    return torch.tensor([*text[1:], *picture[-AFTER_PICTURE:]])


@pytest.fixture
def at_original_weights(engine: Engine) -> Iterator[Engine]:
    """Give the engine back as it was."""
    yield engine
    engine.ask("POST", "/end_weight_update", {})
    engine.ask("POST", "/continue_generation", {})
    engine.post("/update_weights_from_disk", {"model_path": str(MODEL), "weight_version": "default"})


@pytest.fixture
def own_at_original_weights(own_engine: Engine, at_original_weights: Engine) -> Engine:
    """Our engine alone, given back as it was."""
    return at_original_weights


@contextmanager
def session(engine: Engine) -> Iterator[None]:
    """Pause, and open a session for the block."""
    engine.post("/pause_generation", {"mode": "retract"})
    engine.post("/begin_weight_update", {})
    yield
    engine.post("/end_weight_update", {})
    engine.post("/continue_generation", {})


@contextmanager
def joined_group(engine: Engine, name: str) -> Iterator[Any]:
    """Make a process group of this process and the engine."""
    port = free_port()
    place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.post, "/init_weights_update_group", place | group_body(name))
        group = join_as_first("127.0.0.1", port, 2, name, "gloo")
        assert asked.result(120) == {
            "success": True,
            "message": "Succeeded to initialize custom process group.",
        }
    yield group
    assert engine.post("/destroy_weights_update_group", {"group_name": name})["success"]
    torch.distributed.destroy_process_group(group)


def group_body(name: str) -> dict[str, Any]:
    return {"group_name": name, "backend": "gloo"}


def in_parts(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split into three, in an order that is not the model's."""
    names = sorted(weights)
    return [{name: weights[name] for name in names[start::3]} for start in range(3)]


def send_tensors(engine: Engine, weights: dict[str, Tensor]) -> None:
    for part in in_parts(weights):
        with payload(part) as given:
            body = {"serialized_named_tensors": [given], "load_format": None, "weight_version": "sent"}
            answer = engine.post("/update_weights_from_tensor", body)
        assert answer == {"success": True, "message": "Success Weight version updated to sent."}


def send_broadcasts(engine: Engine, weights: dict[str, Tensor], *, flat: bool) -> None:
    name = f"updates-{flat}"
    with joined_group(engine, name) as group, ThreadPoolExecutor(1) as pool:
        for part in in_parts(weights):
            body = {"group_name": name, "load_format": "flattened_bucket" if flat else None}
            body |= described(part) | {"weight_version": "sent"}
            asked = pool.submit(engine.post, "/update_weights_from_distributed", body)
            broadcast(part, group, flat=flat)
            assert asked.result(120) == {
                "success": True,
                "message": "Succeeded to update parameter online. Weight version updated to sent.",
            }


@pytest.mark.parametrize("way", ["tensors", "broadcasts", "flat"])
def test_sent_weights_are_served(
    at_original_weights: Engine, weights: dict[str, Tensor], expected: Tensor, way: str
) -> None:
    engine = at_original_weights
    assert float((scores(engine) - expected).abs().max()) > 0.5
    with session(engine):
        if way == "tensors":
            send_tensors(engine, weights)
        else:
            send_broadcasts(engine, weights, flat=way == "flat")
    assert engine.ask("GET", "/model_info")[1]["weight_version"] == "sent"
    torch.testing.assert_close(scores(engine), expected, atol=TOLERANCE, rtol=0)


def test_an_update_under_running_requests_is_done_and_answered_400(at_original_weights: Engine) -> None:
    engine = at_original_weights
    with running_request(engine, "under-an-update") as request:
        engine.post("/pause_generation", {"mode": "in_place"})
        engine.post("/begin_weight_update", {})
        with payload({NAME: torch.ones(64)}) as given:
            update = {"serialized_named_tensors": [given], "weight_version": "next"}
            status, answer = engine.ask("POST", "/update_weights_from_tensor", update)
        assert (status, answer["success"]) == (400, False)
        assert answer["message"].startswith("Weights were updated, but the cache was not flushed")
        engine.post("/end_weight_update", {})
        engine.post("/continue_generation", {})
        request.go_on()
        old, new = request.abort()["meta_info"]["weight_versions"]
    assert (old["version"], new["version"]) == ("default", "next")
    assert 0 < old["end"] == new["start"] < new["end"]


def test_an_unknown_group_is_refused(at_original_weights: Engine) -> None:
    engine = at_original_weights
    with session(engine):
        body = described({NAME: torch.ones(64)}) | {"group_name": "nobody's"}
        status, answer = engine.ask("POST", "/update_weights_from_distributed", body)
    assert (status, answer["success"]) == (400, False)
    assert "nobody's" in answer["message"]
    assert "init_weights_update_group" in answer["message"]


def test_wrong_tensors_are_refused_and_the_old_ones_stay(
    own_at_original_weights: Engine, weights: dict[str, Tensor]
) -> None:
    engine = own_at_original_weights
    before = scores(engine)
    right = {NAME: weights[NAME]}
    with session(engine):
        for wrong, named in (
            ({"model.nothing": torch.ones(3)}, "model.nothing"),
            ({"lm_head.weight": torch.ones(3)}, "lm_head.weight has shape (3,)"),
            ({"lm_head.weight": torch.ones(384 * 64)}, "lm_head.weight has shape"),
        ):
            with payload(right | wrong) as given:
                status, answer = engine.ask(
                    "POST", "/update_weights_from_tensor", {"serialized_named_tensors": [given]}
                )
            assert (status, answer["success"]) == (400, False)
            assert named in answer["message"]
    assert torch.equal(scores(engine), before)


def test_malformed_updates_are_refused_and_the_engine_lives(own_at_original_weights: Engine) -> None:
    engine = own_at_original_weights
    before = scores(engine)
    with session(engine), payload({NAME: torch.ones(64)}) as given:
        for body, named in (
            ({"serialized_named_tensors": [given[: len(given) // 8 * 4]]}, "no whole pickle"),
            ({"serialized_named_tensors": ["?"]}, "base64"),
            ({"serialized_named_tensors": [pickled([(NAME, {"a": 1})])]}, "EMPTY_DICT"),
            ({"serialized_named_tensors": [given, given]}, "one payload"),
            ({"serialized_named_tensors": None}, "serialized_named_tensors"),
            ({}, "serialized_named_tensors"),
            ({"serialized_named_tensors": [given], "load_format": "direct"}, "direct"),
            ({"serialized_named_tensors": [given], "weight_version": 3}, "weight_version"),
        ):
            status, answer = engine.ask("POST", "/update_weights_from_tensor", body)
            assert status == 400
            assert named in answer["message"]
        announced = described({NAME: torch.ones(64)})
        for wrong, named in (
            ({"names": []}, "names"),
            ({"dtypes": ["bfloat16", "bfloat16"]}, "names"),
            ({"shapes": [[-1]]}, "shapes"),
            ({"group_name": ""}, "group_name"),
            ({"load_format": "other"}, "other"),
        ):
            status, answer = engine.ask("POST", "/update_weights_from_distributed", announced | wrong)
            assert status == 400
            assert named in answer["message"]
    assert torch.equal(scores(engine), before)


def test_groups_that_cannot_be_are_refused(own_engine: Engine) -> None:
    place = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2}
    for wrong, named in (
        ({"backend": "nccl"}, "gloo"),
        ({"rank_offset": 0}, "rank_offset"),
        ({"rank_offset": 2}, "rank_offset"),
        ({"world_size": 1}, "world_size"),
        ({"master_address": 7}, "master_address"),
    ):
        status, answer = own_engine.ask(
            "POST", "/init_weights_update_group", place | group_body("never") | wrong
        )
        assert status == 400
        assert named in answer["message"]


DYING_TRAINER = """
import sys, time
from slime.weight_sync.distributed import join_as_first
group = join_as_first("127.0.0.1", int(sys.argv[1]), 2, "dying", "gloo")
print("joined", flush=True)
time.sleep(600)
"""


def test_a_trainer_that_dies_mid_update_does_not_hold_the_engine(
    own_at_original_weights: Engine, weights: dict[str, Tensor]
) -> None:
    engine, port = own_at_original_weights, free_port()
    before = scores(engine)
    place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    command = [sys.executable, "-c", DYING_TRAINER, str(port)]
    with (
        session(engine),
        ThreadPoolExecutor(2) as pool,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer,
    ):
        joining = pool.submit(engine.post, "/init_weights_update_group", place | group_body("dying"))
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "joined\n"
        assert joining.result(120)["success"]
        body = described({NAME: weights[NAME]}) | {"group_name": "dying"}
        asked = pool.submit(engine.ask, "POST", "/update_weights_from_distributed", body)
        with pytest.raises(FutureTimeoutError):
            asked.result(0.5)
        trainer.kill()
        status, answer = asked.result(120)
        assert (status, answer["success"]) == (400, False)
        engine.post("/destroy_weights_update_group", {"group_name": "dying"})
    assert torch.equal(scores(engine), before)
