"""Requests that nobody vetted: each gets an answer or a 4xx, and the next good one what it always gets."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import orjson
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slime.engines.transformers_engine.__main__ import build, parse_args
from slime.utils.processing_utils import encode_image_for_rollout_engine
from tests.contracts.engine_api.support import MODEL, drawn_picture
from tests.unit.engines.transformers_engine.support import PICTURE_PROMPT, TEXT_PROMPT

T = TypeVar("T")
CONTROL = (
    *("/pause_generation", "/continue_generation", "/abort_request", "/update_weights_from_disk"),
    *("/update_weight_version", "/begin_weight_update", "/end_weight_update", "/update_weights_from_tensor"),
    *("/update_weights_from_distributed", "/destroy_weights_update_group", "/get_weights_by_name"),
    *("/weights_checker", "/flush_cache", "/init_weights_update_group"),
)
"""Not `/release_memory_occupation` and its kin, which would take the model away from the next request."""
DEEP = "nested without end"
"""Stands for lists in lists, which no writer of JSON takes."""
HUGE = 2**64 - 1
SCALARS = (
    st.sampled_from(
        [None, True, False, 0, 1, -1, 5, HUGE, -(2**63), 0.5, 1e300, "", "a", "/etc/passwd", "<image>"]
    )
    | st.sampled_from(
        ["file:///dev/zero", "http://127.0.0.1:9/", "data:image/png;base64,AAAA", "\u0663", "9" * 5000]
    )
    | st.integers(-3, 400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
KEYS = st.sampled_from(
    ["url", "n", "stop", "wave", "wave_size", "order", "1", "999999", "min_new_tokens"]
) | st.text(max_size=3)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
) | st.just(DEEP)
PARAMS = st.dictionaries(
    st.sampled_from(
        [
            *("n", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "min_new_tokens"),
            *("frequency_penalty", "repetition_penalty", "ignore_eos", "logit_bias", "sampling_seed"),
            *("custom_params", "stream_interval", "regex", "no_such_key"),
        ]
    ),
    JSON,
    max_size=4,
).map(lambda params: {"max_new_tokens": 3} | params)
IDS = st.just(TEXT_PROMPT) | st.just(PICTURE_PROMPT) | st.lists(st.integers(-2, 400), max_size=4) | JSON
GENERATE = st.fixed_dictionaries(
    {
        "input_ids": IDS | st.lists(IDS, max_size=2),
        "sampling_params": PARAMS | st.lists(PARAMS, max_size=2) | JSON,
    },
    optional={
        "text": st.just("a") | st.lists(st.just("a"), max_size=2) | JSON,
        "image_data": JSON,
        "rid": st.just("r") | st.lists(st.just("r"), max_size=2) | JSON,
        "return_logprob": st.booleans() | JSON,
        "logprob_start_len": st.integers(-3, 20) | JSON,
        "top_logprobs_num": st.integers(-1, 5) | JSON,
        "token_ids_logprob": st.lists(st.integers(-1, 500), max_size=3) | JSON,
        "return_flat_raw_top_logprobs": st.booleans(),
        "stream": st.booleans() | JSON,
    },
)
CONTROLLED = st.tuples(
    st.sampled_from(CONTROL),
    st.dictionaries(
        st.sampled_from(
            [
                *("mode", "rid", "abort_all", "model_path", "new_version", "weight_version", "tags", "names"),
                *("dtypes", "shapes", "serialized_named_tensors", "load_format", "group_name", "flush_cache"),
                *("master_port", "rank_offset", "world_size"),
            ]
        ),
        JSON | st.lists(st.sampled_from(["gASV", "float32", "a"]), max_size=2),
        max_size=5,
    )
    | JSON,
)
REQUESTS = st.tuples(st.just("/generate"), GENERATE | JSON) | CONTROLLED


class _Engine:
    """An engine in this process, asked from synchronous code."""

    def __init__(self) -> None:
        args = parse_args(["--model-path", str(MODEL), "--port", "1", "--max-running-requests", "16"])
        self.loop = asyncio.new_event_loop()
        self.batcher, self.generator, app = build(args, lambda: None)
        self.batcher.start()
        self.client = self._run(self._open(app))
        self.expected = self.answer()

    async def _open(self, app: Any) -> TestClient:
        client = TestClient(TestServer(app))
        await client.start_server()
        return client

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 240))

    def ask(self, path: str, body: bytes) -> tuple[int, bytes]:
        async def ask() -> tuple[int, bytes]:
            async with self.client.post(path, data=body) as answer:
                return answer.status, await answer.read()

        return self._run(ask())

    def answer(self) -> list[int]:
        """Undo what a control verb did, and return what the engine says to a good request."""
        self.ask("/continue_generation", b"{}")
        self.ask("/end_weight_update", b"{}")
        body = {"input_ids": TEXT_PROMPT, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        status, answer = self.ask("/generate", orjson.dumps(body))
        assert status == 200
        return orjson.loads(answer)["output_ids"]

    def close(self) -> None:
        self._run(self.client.close())
        self.batcher.stop()
        self.generator.close()
        self.loop.close()


def _encoded(body: Any) -> bytes:
    return orjson.dumps(body).replace(orjson.dumps(DEEP), b"[" * 900 + b"]" * 900)


@pytest.fixture(scope="module")
def engine() -> Iterator[_Engine]:
    engine = _Engine()
    yield engine
    engine.close()


def _check(engine: _Engine, path: str, body: Any) -> None:
    status, answer = engine.ask(path, _encoded(body))
    crashes_there = (
        status == 500 and answer == b"Internal Server Error"
    )  # a file that is not there, surplus pads
    assert status in (200, 400, 503) or crashes_there, (status, answer[:300])
    assert not engine.batcher.failed


def test_the_text_of_a_handlers_crash_is_not_that_of_a_foreseen_fault(engine: _Engine) -> None:
    """So that the checks above cannot take one for the other: aiohttp's own 500 says more."""
    status, answer = engine.ask("/generate", orjson.dumps({"input_ids": [1], "image_data": "/no/such.png"}))
    assert (status, answer) == (500, b"Internal Server Error")
    async_crash = b"500 Internal Server Error"
    assert async_crash != answer


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(request=REQUESTS)
@example(request=("/flush_cache?timeout=soon", {}))
@example(request=("/flush_cache?timeout=inf", {}))
@example(request=("/generate", {"text": ["a"], "input_ids": [1]}))
def test_any_request_is_answered(engine: _Engine, request: tuple[str, Any]) -> None:
    _check(engine, *request)
    assert engine.answer() == engine.expected


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(
    max_examples=10_000,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(request=REQUESTS)
def test_ten_thousand_requests_are_answered(engine: _Engine, request: tuple[str, Any]) -> None:
    _check(engine, *request)
    assert engine.answer() == engine.expected


PICTURE = encode_image_for_rollout_engine(drawn_picture(1))
GOOD = {"input_ids": TEXT_PROMPT, "sampling_params": {"max_new_tokens": 2}}


def _params(**params: Any) -> dict[str, Any]:
    return GOOD | {"sampling_params": {"max_new_tokens": 2, **params}}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (GOOD | {"input_ids": [HUGE]}, 400),
        (GOOD | {"input_ids": [None]}, 400),
        (GOOD | {"input_ids": [[1], [2]], "text": "a"}, 400),
        (GOOD | {"input_ids": [1], "text": ["a"]}, 400),
        (GOOD | {"input_ids": [[1], [2]], "rid": ["r", "r"]}, 400),
        (GOOD | {"image_data": {"detail": "low"}}, 400),
        (GOOD | {"image_data": {"url": 5}}, 400),
        (GOOD | {"image_data": DEEP}, 400),
        (GOOD | {"input_ids": [[1]], "image_data": [[["a"]]]}, 400),
        (GOOD | {"image_data": "\u00e9"}, 400),
        (GOOD | {"image_data": "file:///dev/zero"}, 500),
        (GOOD | {"image_data": "/proc/self/environ"}, 400),
        (GOOD | {"sampling_params": DEEP}, 400),
        (_params(n=10**9), 400),
        (_params(stop_token_ids=5), 400),
        (_params(stop_token_ids=[HUGE, -7], min_new_tokens=1), 200),
        (_params(top_k=HUGE), 200),
        (_params(logit_bias={"9" * 5000: 1.0}), 400),
        (_params(custom_params={"wave": "w", "wave_size": True, "order": 0}), 400),
        (DEEP, 400),
    ],
)
def test_found_requests(engine: _Engine, body: Any, status: int) -> None:
    assert engine.ask("/generate", _encoded(body))[0] == status
    assert not engine.batcher.failed


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"input_ids": [1e999]}', b"\0"]
)
def test_what_is_no_json_is_malformed(engine: _Engine, body: bytes) -> None:
    for path in ("/generate", "/pause_generation", "/update_weights_from_disk"):
        assert engine.ask(path, body)[0] == 400
