"""Keys, hosts and routes that no contract test sees."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientConnectionResetError
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import StreamResponse

from slime.engines.client import EngineClient
from slime.engines.transformers_engine.__main__ import build, is_loopback, parse_args
from slime.engines.transformers_engine.generation import Generator
from slime.tiny.paths import checkpoint_path
from slime.utils.processing_utils import encode_image_for_rollout_engine
from tests.contracts.engine_api.support import MODEL, drawn_picture
from tests.unit.engines.transformers_engine.support import TEXT_PROMPT

BODY = {"input_ids": TEXT_PROMPT, "sampling_params": {"max_new_tokens": 2}}


@pytest.fixture
async def client(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[TestClient]:
    for name, value in getattr(request, "param", {}).items():
        monkeypatch.setenv(name, value)
    async with serving(MODEL) as client:
        yield client


@asynccontextmanager
async def serving(
    model: Path, spy: Callable[[Generator, str | None], None] | None = None
) -> AsyncIterator[TestClient]:
    args = parse_args(["--model-path", str(model), "--port", "1", "--served-model-name", "student"])
    batcher, generator, app = build(args, lambda: None)
    if spy is not None:
        abort = generator.abort
        generator.abort = lambda rid: (spy(generator, rid), abort(rid))[1]
    batcher.start()
    async with TestClient(TestServer(app)) as client:
        yield client
    batcher.stop()
    generator.close()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "client", [{"SLIME_ENGINE_API_KEY": "user", "SLIME_ENGINE_ADMIN_KEY": "root"}], indirect=True
)
async def test_each_key_opens_its_own_doors(client):
    assert (await client.get("/health")).status == 200
    assert (await client.get("/ready")).status == 200
    for path in ("/health_generate", "/server_info", "/model_info", "/v1/models"):
        assert (await client.get(path)).status == 401
    odd = {"Authorization": b"Bearer \xff\xfe".decode("utf-8", "surrogateescape")}
    assert (await client.get("/server_info", headers=odd)).status == 401
    assert (await client.post("/generate", json=BODY)).status == 401
    assert (await client.post("/generate", json=BODY, headers=bearer("root"))).status == 401
    assert (await client.post("/generate", json=BODY, headers=bearer("user"))).status == 200
    assert (await client.get("/flush_cache", headers=bearer("user"))).status == 401
    assert (await client.get("/flush_cache", headers=bearer("root"))).status == 200


async def test_without_keys_all_is_open(client):
    assert (await client.post("/flush_cache", json={})).status == 200
    assert (await client.put("/generate", json=BODY)).status == 200


async def test_unknown_paths_and_methods(client):
    missing = await client.get("/metrics")
    assert (missing.status, await missing.json()) == (404, {"detail": "Not Found"})
    assert (await client.get("/generate")).status == 405


async def test_broken_json_is_malformed(client):
    answer = await client.post("/generate", data="{", headers={"Content-Type": "application/json"})
    assert answer.status == 400
    assert (await answer.json())["object"] == "error"


async def test_server_info_holds_settings_and_counts_but_no_key(client):
    await client.post("/generate", json=BODY)
    info = await (await client.get("/server_info")).json()
    assert info["served_model_name"] == "student"
    assert info["internal_states"][0]["decode_forwards"] >= 1
    assert not [key for key in info if "api" in key or "admin" in key]


async def test_a_text_model_answers_and_refuses_pictures():
    async with serving(checkpoint_path("text_teacher")) as client:
        info = await (await client.get("/model_info")).json()
        assert (info["model_type"], info["has_image_understanding"]) == ("qwen3", False)
        text = "<|im_start|>user\nA rhombus has diagonals 10 and 3. What is its area?<|im_end|>\n"
        body = {
            "text": f"{text}<|im_start|>assistant\n",
            "sampling_params": {"max_new_tokens": 64, "temperature": 0},
        }
        answer = await (await client.post("/generate", json=body)).json()
        assert answer["text"].endswith("\\boxed{15}")
        picture = encode_image_for_rollout_engine(drawn_picture(1))
        refused = await client.post("/generate", json=body | {"image_data": picture})
        assert refused.status == 400
        assert "takes text alone" in (await refused.json())["error"]["message"]


async def test_two_requests_with_one_id_are_refused(client):
    long = BODY | {"rid": "same", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    first = asyncio.ensure_future(client.post("/generate", json=long))
    while not (await (await client.get("/server_info")).json())["running_requests"]:
        assert not first.done()
    second = await client.post("/generate", json=long)
    assert second.status == 400
    assert "Duplicate request ID" in (await second.json())["error"]["message"]
    await client.post("/abort_request", json={"rid": "same"})
    assert (await (await first).json())["meta_info"]["finish_reason"]["type"] == "abort"


async def test_a_caller_that_is_cancelled_frees_its_row_by_an_abort():
    """As a rollout's deadline does it: the request is still there when its abort comes."""
    aborts: list[tuple[str | None, int]] = []
    payload = {"input_ids": TEXT_PROMPT, "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    async with (
        serving(MODEL, lambda generator, rid: aborts.append((rid, generator.in_flight))) as client,
        EngineClient([str(client.make_url("/generate"))]) as engine,
    ):
        straggler = asyncio.create_task(engine.generate(payload, abort_when_cancelled=True))
        while not (await (await client.get("/server_info")).json())["running_requests"]:
            assert not straggler.done()
        straggler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await straggler
        ((rid, in_flight),) = aborts
        assert str(rid).startswith("slime-")
        assert in_flight == 1
        assert (await idle(client))["internal_states"][0]["decode_forwards"] < 3900


async def idle(client: TestClient) -> dict[str, Any]:
    """Return what the server says of itself once it runs nothing."""
    while True:
        info = await (await client.get("/server_info")).json()
        if info["running_requests"] == 0:
            return info
        await asyncio.sleep(0.01)


async def test_a_client_that_leaves_frees_its_row(client):
    long = BODY | {"stream": True, "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    response = await client.post("/generate", json=long)
    await response.content.readline()
    response.close()
    assert (await idle(client))["internal_states"][0]["decode_forwards"] < 3900


async def test_a_reset_between_two_tokens_frees_the_row(client, monkeypatch):
    write, reset = StreamResponse.write, asyncio.Event()

    async def reset_after_the_first(self: StreamResponse, data: bytes) -> None:
        if reset.is_set():
            raise ClientConnectionResetError("Cannot write to closing transport")
        await write(self, data)
        reset.set()

    monkeypatch.setattr(StreamResponse, "write", reset_after_the_first)
    long = BODY | {"stream": True, "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    await client.post("/generate", json=long)
    await reset.wait()
    assert (await idle(client))["internal_states"][0]["decode_forwards"] < 3900


async def test_a_dead_model_thread_fails_its_requests(client, monkeypatch):
    def explode(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("slime.engines.transformers_engine.stepper.Stepper.step", explode)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    answer = await client.post("/generate", json=BODY)
    assert answer.status == 503
    assert "engine's log" in (await answer.json())["message"]
    assert (await client.get("/health")).status == 503
    assert (await client.post("/generate", json=BODY)).status == 503


def test_an_open_host_needs_a_key(monkeypatch, capsys):
    argv = ["--model-path", "m", "--port", "1", "--host", "0.0.0.0"]
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert "SLIME_ENGINE_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("SLIME_ENGINE_API_KEY", "k")
    assert parse_args(argv).host == "0.0.0.0"
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "box")] == [
        True
    ] * 3 + [False] * 2
