"""A stand-in teacher that answers at once, in SGLang's exact JSON: it measures clients, not models.

`python -m scripts.benchmarks.scoring.stub --port …`. Answers are rendered once per (ids, start) and sent
again from memory. What was asked is noted and counted later, on `GET /counts`, outside of anybody's time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import struct
import sys
import time
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from scripts.benchmarks.scoring.radix import Asked, count
from scripts.benchmarks.scoring.workload import QWEN3_VL, Vocabulary, picture_tokens

MAX_BODY = 2**28
PNG_HEAD = 24
"""Bytes of a PNG up to the end of width and height."""
PNG_HEAD_BASE64 = PNG_HEAD * 4 // 3
RID = b'"@rid@"'


class Stub:
    """The server's answers and its notes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bodies: dict[tuple[int, int, int, int], tuple[bytes, bytes]] = {}
        self._asked: list[Asked] = []
        self._bytes_in = 0
        self._bytes_out = 0

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Answer a scoring request."""
        arrived = time.perf_counter()
        raw = await request.read()
        body = orjson.loads(raw)
        tokens, start = body["input_ids"], body["logprob_start_len"]
        images = body.get("image_data") or []
        counts = [picture_tokens(*png_size(uri)) for uri in images]
        head, tail = self._rendered(tokens, start, sum(counts))
        answer = head + orjson.dumps(body.get("rid") or f"{random.getrandbits(128):032x}") + tail
        response = web.Response(body=answer, content_type="application/json")
        await response.prepare(request)
        await response.write_eof()
        self._bytes_in += len(raw)
        self._bytes_out += len(answer)
        pad = self._vocabulary.image_pad
        hashes = [hash(uri) for uri in images]
        self._asked.append(Asked(arrived, time.perf_counter(), tokens, start, counts, hashes, pad))
        return response

    def _rendered(self, tokens: list[int], start: int, image_tokens: int) -> tuple[bytes, bytes]:
        """Return the answer's bytes before and after the request's id."""
        key = (hash(tuple(tokens)), len(tokens), start, image_tokens)
        if key not in self._bodies:
            answer = orjson.dumps(self._answer(tokens, start, image_tokens))
            head, _, tail = answer.partition(RID)
            self._bodies[key] = (head, tail)
        return self._bodies[key]

    def _answer(self, tokens: list[int], start: int, image_tokens: int) -> dict[str, Any]:
        pad, last = self._vocabulary.image_pad, self._vocabulary.size - 1
        expanded: list[int] = []
        for token in tokens:
            # image positions and the last id come back as 0
            expanded += [0] * image_tokens if token == pad else [token if token < last else 0]
        # a score depends on the sequence and its position alone: who asks for fewer gets the same
        scores = -np.random.default_rng(tokens).exponential(size=len(expanded)).astype(np.float32)
        pairs = zip(scores[start:].tolist(), expanded[start:], strict=True)
        triples = [[score, token, None] for score, token in pairs]
        triples[0][0] = None
        meta = {
            "id": "@rid@",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(expanded),
            "weight_version": "default",
            "num_retractions": 0,
            "input_token_logprobs": triples,
            "output_token_logprobs": [],
            "output_token_logprobs_length": 0,
            "reasoning_tokens": 0,
            "completion_tokens": 0,
            "cached_tokens": 0,
            "weight_versions": [{"version": "default", "start": 0, "end": 0}],
            "cached_tokens_details": None,
            "image_tokens": image_tokens,
            "dp_rank": None,
            "e2e_latency": 0.001,
            "response_sent_to_client_ts": 0.0,
        }
        return {"text": "", "output_ids": [], "meta_info": meta}

    async def counts(self, request: web.Request) -> web.Response:
        """Report what was asked since the last flush."""
        counts = count(self._asked) | {"bytes_in": self._bytes_in, "bytes_out": self._bytes_out}
        return web.Response(body=orjson.dumps(counts), content_type="application/json")

    async def flush(self, request: web.Request) -> web.Response:
        """Forget the notes, and with them the cache that they stand for."""
        self._asked.clear()
        self._bytes_in = self._bytes_out = 0
        return web.Response(text="Cache flushed.")

    async def ready(self, request: web.Request) -> web.Response:
        """Say that the server is up."""
        return web.Response()


def png_size(uri: str) -> tuple[int, int]:
    """Return width and height of a PNG data URI without decoding the picture."""
    kind, _, data = uri.partition(",")
    if kind != "data:image/png;base64":
        raise web.HTTPBadRequest(text=f"{kind[:40]!r}: only PNG data URIs are taken.")
    return struct.unpack(">II", base64.b64decode(data[:PNG_HEAD_BASE64])[16:PNG_HEAD])


async def serve(port: int) -> None:
    """Serve until the process is ended."""
    stub = Stub(QWEN3_VL)
    app = web.Application(client_max_size=MAX_BODY)
    app.router.add_post("/generate", stub.generate)
    app.router.add_get("/counts", stub.counts)
    app.router.add_post("/flush_cache", stub.flush)
    app.router.add_get("/ready", stub.ready)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


def main() -> int:
    parser = argparse.ArgumentParser(description="A stand-in teacher that answers at once.")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    asyncio.run(serve(parser.parse_args().port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
