"""A small server with SGLang's `/generate`, for tests of clients: a made-up model, a record of requests,
planted faults.

Its "model" gives every (token, expanded position) a log-prob by a formula, so a test knows what must come
back. Runs in a thread of its own: synchronous and asynchronous tests use it alike.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from aiohttp import web
from PIL import Image

from tests.fakes.serving import in_thread

MERGED_PATCH = 32
"""Side in pixels of what becomes one image token."""
EOS = 2


def _others(token: int, count: int) -> list[int]:
    """Return the first ids from 1 on that are not `token`."""
    return [id_ for id_ in range(1, count + 2) if id_ != token][:count]


def log_prob(token: int, position: int, pictures: int = 0) -> float:
    """Return the made-up model's log-prob of a token at an expanded position; it depends on being shown a
    picture."""
    return -(0.05 + ((token * 31 + position * 17 + pictures * 7) % 97) / 20)


SESSION_PATHS = (
    "/begin_weight_update",
    "/end_weight_update",
    "/update_weights_from_tensor",
    "/update_weights_from_distributed",
)


@dataclass
class FakeEngine:
    """Behaviour and record of one fake server."""

    image_token_id: int
    vocab_size: int
    responses: list[list[int]] = field(default_factory=lambda: [[11, 12, EOS]])
    """What is sampled: the response at the seed's place, round and round."""
    texts: list[str] = field(default_factory=lambda: ["\\boxed{4}"])
    fault: str | None = None
    fault_times: int = 10**9
    """How many requests meet the fault."""
    delay: float = 0.0
    """Seconds that an answer takes at least."""
    answer_when: Callable[[], bool] = lambda: True
    """A request that has come is answered once this holds: however slow a machine is, it is in flight until
    then."""
    top_form: Literal["base64", "flat", "long"] = "base64"
    """How the top-k is written."""
    control_delay: float = 0.0
    """Seconds that any other path takes."""
    abort_status: int = 200
    """What an abort is answered; the request ends either way."""
    version: str = "default"
    session_open: bool = False
    """Whether a weight update is under way."""
    requests: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)
    """(path, body, headers) in order of arrival."""
    generate_times: list[tuple[float, float]] = field(default_factory=list)
    """(start, end) of each generating or scoring request."""
    url: str = ""
    hanging: int = 0
    """How many requests were left without an answer."""
    in_flight: int = 0
    most_in_flight: int = 0
    aborted: list[str] = field(default_factory=list)
    """Ids of the requests that were aborted while they were worked on."""
    _straggling: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def straggling(self) -> int:
        """Number of requests that wait to be aborted."""
        return len(self._straggling)

    def bodies(self, path: str = "/generate") -> list[Any]:
        """Return the bodies that were posted to a path."""
        return [body for seen, body, _ in self.requests if seen == path]

    # ---- HTTP ----

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Record the request and answer it, by the fault if one is planted."""
        raw = await request.read()
        body: Any = json.loads(raw) if raw else None
        self.requests.append((request.path, body, dict(request.headers)))
        if request.path != "/generate":
            await asyncio.sleep(self.control_delay)
            return self._control(request.path, body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        start = time.perf_counter()
        try:
            await asyncio.sleep(self.delay)
            while not self.answer_when():  # noqa: ASYNC110 (it is about other threads)
                await asyncio.sleep(0.005)
            return await self._generate(request, body)
        finally:
            self.in_flight -= 1
            self.generate_times.append((start, time.perf_counter()))

    def _control(self, path: str, body: Any) -> web.Response:
        if self._faulty("unflushed") and path == "/update_weights_from_disk":
            message = "Weights were updated, but the cache was not flushed."
            return web.json_response({"success": False, "message": message}, status=400)
        if self._faulty("busy") and path == "/flush_cache":
            self._count_fault()
            return web.Response(text="Flush cache failed: pending requests.", status=400)
        if self._faulty("corrupt") and path == "/update_weights_from_disk":
            return web.json_response({"success": False, "message": "no such checkpoint"}, status=400)
        if path == "/update_weights_from_disk":
            self.version = body["weight_version"]
            return web.json_response({"success": True, "message": "ok"})
        if path in SESSION_PATHS:
            return self._session(path)
        if path == "/abort_request":
            straggler = self._straggling.pop(body["rid"], None)
            if straggler is not None:  # the real server too says 200 to an id that it does not know
                self.aborted.append(body["rid"])
                straggler.set()
            return web.Response(status=self.abort_status)
        if path == "/ready" and self.fault is not None and self.fault_times > 0:
            return web.Response(status=503)
        if path == "/flush_cache":
            return web.Response(text="Cache flushed.")
        if path == "/model_info":
            return web.json_response({"model_path": "fake", "weight_version": self.version})
        return web.json_response({"message": "ok", "status": "ok"})

    def _session(self, path: str) -> web.Response:
        """Answer what belongs to a weight-update session, with the real server's refusals."""
        begins = path == "/begin_weight_update"
        if begins == self.session_open:
            message = (
                "a weight-update session is already open" if begins else f"no session is open for {path}"
            )
            return web.json_response({"success": False, "message": message}, status=400)
        if path in ("/begin_weight_update", "/end_weight_update"):
            self.session_open = begins
        self.version = (self.requests[-1][1] or {}).get("weight_version", self.version)
        return web.json_response({"success": True, "message": "Success"})

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        broken = await self._broken_transport(request)
        if broken is not None:
            return broken
        if self._faulty("straggle"):
            self._count_fault()
            await self._straggle(body["rid"])
        answer = self.answer(body)
        if self._faulty("truncated_json"):
            return web.Response(body=json.dumps(answer)[:-20].encode(), content_type="application/json")
        # NaN, where it is planted, goes out as Python's json writes it
        return web.Response(body=json.dumps(answer).encode(), content_type="application/json")

    async def _straggle(self, rid: str) -> None:
        """Work on a request until it is aborted."""
        aborted = self._straggling[rid] = asyncio.Event()
        await aborted.wait()

    async def _broken_transport(self, request: web.Request) -> web.StreamResponse | None:
        """Answer in place of the model where the fault lies below it."""
        if self._faulty("400"):
            self._count_fault()
            return web.json_response(
                {"error": {"message": "the input is longer than the context"}}, status=400
            )
        if self._faulty("500"):
            self._count_fault()
            return web.Response(text="Internal Server Error", status=500)
        for status in ("408", "429", "502", "503", "504"):
            if self._faulty(status):
                self._count_fault()
                return web.json_response({"object": "error", "message": "queue full"}, status=int(status))
        if self._faulty("html"):
            return web.Response(text="<html>a proxy's page</html>", content_type="text/html")
        if self._faulty("hang"):
            self._count_fault()
            self.hanging += 1
            await asyncio.sleep(600)
        if self._faulty("reset") and request.transport is not None:
            self._count_fault()
            request.transport.abort()
            raise ConnectionResetError("planted")
        return None

    def _faulty(self, name: str) -> bool:
        return self.fault == name and self.fault_times > 0

    def _count_fault(self) -> None:
        self.fault_times -= 1

    # ---- the model ----

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return what a server with the planted fault answers."""
        images = body.get("image_data") or []
        if self._faulty("drop_image"):
            images = []
        expanded = self._expand(body["input_ids"], images)
        params = body["sampling_params"]
        sampled: list[int] = []
        text = ""
        if params.get("max_new_tokens", 128) > 0:
            turn = params.get("sampling_seed", 0)
            sampled = self.responses[turn % len(self.responses)][: params["max_new_tokens"]]
            text = self.texts[turn % len(self.texts)]
        stopped = bool(sampled) and sampled[-1] == EOS
        meta: dict[str, Any] = {
            "id": self._answered_id(body),
            "finish_reason": {"type": "stop", "matched": EOS} if stopped else {"type": "length", "length": 0},
            "prompt_tokens": len(expanded),
            "completion_tokens": len(sampled),
            "cached_tokens": 0,
            "weight_version": self.version,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(sampled)}],
            "image_tokens": expanded.count(self.image_token_id),
        }
        if self._faulty("abort"):
            meta["finish_reason"] = {"type": "abort", "message": "Abort in waiting queue"}
        if self._faulty("mixed"):
            meta["weight_versions"] = [
                {"version": "1", "start": 0, "end": 1},
                {"version": "2", "start": 1, "end": 2},
            ]
        start = body.get("logprob_start_len", -1)
        places = range(len(expanded)) if start < 0 else range(start, len(expanded))
        triples = [[log_prob(expanded[p], p, len(images)), self._reported(expanded[p]), None] for p in places]
        if triples:
            triples[0][0] = None
        meta["input_token_logprobs"] = self._spoil(triples) if start >= 0 else []
        if body.get("top_logprobs_num"):
            meta |= self._top(triples, body["top_logprobs_num"])
        meta["output_token_logprobs"] = [
            [log_prob(token, len(expanded) + number, len(images)), self._reported(token), None]
            for number, token in enumerate(sampled)
        ]
        return {"text": text, "output_ids": sampled, "meta_info": meta}

    def _answered_id(self, body: dict[str, Any]) -> str:
        """Return the request's id, or that of the one before where answers are mixed up."""
        ids = [seen.get("rid", "fake") for seen in self.bodies()] or [body.get("rid", "fake")]
        if self._faulty("gateway"):
            return "an id of the gateway's own"
        return ids[-2] if self._faulty("another_request") and len(ids) > 1 else body.get("rid", "fake")

    def _expand(self, tokens: list[int], images: list[str]) -> list[int]:
        """Put each picture's tokens in the place of its pad; pads without a picture stay, as on the real
        server."""
        left = [self._picture_tokens(image) for image in images]
        expanded: list[int] = []
        for token in tokens:
            count = left.pop(0) if token == self.image_token_id and left else 1
            expanded += [token] * count
        return expanded

    def _picture_tokens(self, uri: str) -> int:
        head, _, data = uri.partition(",")
        assert head == "data:image/png;base64", head
        width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
        return (width // MERGED_PATCH) * (height // MERGED_PATCH)

    def _top(self, triples: list[list[Any]], top_k: int) -> dict[str, Any]:
        """Return rows of `top_k`, the sampled token's first, in the form that `top_form` says."""
        rows = [
            [[lp - place, id_, None] for place, id_ in enumerate([token, *_others(token, top_k - 1)])]
            for lp, token, _ in triples[1:]
        ]
        if self._faulty("shifted_top"):
            rows = [rows[-1], *rows[:-1]]
        if self.top_form == "long":
            return {"input_top_logprobs": [None, *rows]}
        values = np.asarray([[triple[0] for triple in row] for row in rows], "<f4").reshape(-1, top_k)
        ids = np.asarray([[triple[1] for triple in row] for row in rows], "<i4").reshape(-1, top_k)
        form = "input_top_logprobs"
        shape = {f"{form}_shape": list(values.shape), f"{form}_null_prefix": 1}
        if self.top_form == "flat":
            return shape | {
                f"{form}_val_flat": values.ravel().tolist(),
                f"{form}_idx_flat": ids.ravel().tolist(),
            }
        return shape | {
            f"{form}_val_flat_b64": base64.b64encode(values.tobytes()).decode(),
            f"{form}_idx_flat_b64": base64.b64encode(ids.tobytes()).decode(),
        }

    def _reported(self, token: int) -> int:
        """Return the id as SGLang reports it: pads and ids from the last one on as 0."""
        return 0 if token == self.image_token_id or token >= self.vocab_size - 1 else token

    def _spoil(self, triples: list[list[Any]]) -> list[list[Any]]:
        """Plant a fault into the scores."""
        if self._faulty("shift"):
            self._count_fault()
            ids = [0, *(token for _, token, _ in triples[:-1])]
            return [[lp, token, text] for (lp, _, text), token in zip(triples, ids, strict=True)]
        if self._faulty("retokenise"):
            return [*triples[:-2], [-0.5, 7777 % self.vocab_size, None], triples[-1]]
        if self._faulty("clip"):
            return [[lp, 0, text] for lp, _, text in triples]
        if self._faulty("short"):
            return triples[len(triples) // 2 + 1 :]
        if self._faulty("other"):
            return [[-1.0, (token + 1) % (self.vocab_size - 1), None] for _, token, _ in triples]
        spoiled = [list(triple) for triple in triples]
        if self._faulty("null") and spoiled:
            spoiled[-1][0] = None
        if self._faulty("nan") and spoiled:
            spoiled[-1][0] = float("nan")
        return spoiled


@contextmanager
def serve(engine: FakeEngine) -> Iterator[FakeEngine]:
    """Serve on a free port of the loopback, in a thread, until the block ends."""
    with in_thread(engine.handle) as url:
        engine.url = url
        yield engine
