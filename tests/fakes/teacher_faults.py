"""Faults of a teacher's server, for the planting proxy; `PLANTED` says which check must give which name."""

import asyncio
import base64
import io
import random
from collections.abc import Callable
from typing import Any

from aiohttp import web
from PIL import Image

from tests.fakes.planting_proxy import Fault, Json

IMAGE_PAD = 6
"""Of the tiny checkpoints."""


# ---- planted faults: what the server says of itself ----


class Says(Fault):
    """Pages with other values."""

    def __init__(self, path: str, **values: Any) -> None:
        self.path, self.values = path, values

    def page(self, path: str, page: Json) -> Json:
        return page | self.values if path == self.path else page


class TextOnly(Fault):
    def page(self, path: str, page: Json) -> Json:
        return page | {"has_image_understanding": False} if path == "/model_info" else page


class Keyed(Fault):
    key = "right"


# ---- planted faults: transport ----


class Instead(Fault):
    """Answers `/generate`, or everything, with something else."""

    def __init__(self, status: int, text: str, kind: str = "text/plain", everywhere: bool = False) -> None:
        self.response = {"status": status, "text": text, "content_type": kind}
        self.everywhere = everywhere

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        return web.Response(**self.response) if self.everywhere or body is not None else None


class Hang(Fault):
    """Never answers `/generate`."""

    asked = False

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        if body is not None:
            self.asked = True
            await asyncio.sleep(600)
        return None


class Reset(Fault):
    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        if body is not None and request.transport is not None:
            request.transport.abort()
        return None


class AnswersAnother(Fault):
    """Gives each request the answer to the one before."""

    def __init__(self) -> None:
        self.last: Json | None = None

    def answer(self, body: Json, answer: Json) -> Json:
        answer["meta_info"]["id"] = body["rid"]
        given, self.last = self.last or answer, answer
        return given


# ---- planted faults: requests ----


class Retokenises(Fault):
    """Swaps two tokens of the response, as a tokenizer that finds another way to write it."""

    def request(self, body: Json) -> Json:
        ids = body.get("input_ids")
        return body | {"input_ids": [*ids[:-3], ids[-2], ids[-3], ids[-1]]} if ids else body


class Truncates(Fault):
    def request(self, body: Json) -> Json:
        return body | {"input_ids": body["input_ids"][:100]} if "input_ids" in body else body


class CutsLongOnes(Fault):
    """Cuts to the context silently, as --allow-auto-truncate does."""

    def request(self, body: Json) -> Json:
        return body | {"input_ids": body["input_ids"][:4000]} if "input_ids" in body else body


class DropsPicture(Fault):
    def request(self, body: Json) -> Json:
        return {key: value for key, value in body.items() if key != "image_data"}


class ExpandsPads(Fault):
    """Sends as many pads as a client of another server version would."""

    def request(self, body: Json) -> Json:
        ids = body.get("input_ids", [])
        if body.get("image_data"):
            body["input_ids"] = [id_ for id_ in ids for _ in range(64 if id_ == IMAGE_PAD else 1)]
        return body


class ChangesPictures(Fault):
    """Sends another picture in each one's place."""

    def __init__(self, change: Callable[[Image.Image], Image.Image]) -> None:
        self.change = change

    def request(self, body: Json) -> Json:
        if body.get("image_data"):
            body["image_data"] = [self._changed(uri) for uri in body["image_data"]]
        return body

    def _changed(self, uri: str) -> str:
        data = io.BytesIO()
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        self.change(image).save(data, format="PNG")
        return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


class MovesStart(Fault):
    def __init__(self, by: int) -> None:
        self.by = by

    def request(self, body: Json) -> Json:
        start = body.get("logprob_start_len")
        return body | {"logprob_start_len": start + self.by} if start else body


# ---- planted faults: answers ----


class Scores(Fault):
    """Changes the triples of scoring answers."""

    def __init__(self, change: Callable[[Json, list[list[Any]]], list[list[Any]]]) -> None:
        self.change = change

    def answer(self, body: Json, answer: Json) -> Json:
        meta = answer["meta_info"]
        if "logprob_start_len" in body:
            meta["input_token_logprobs"] = self.change(body, meta["input_token_logprobs"])
        return answer


class Counts(Fault):
    """Counts every pad twice."""

    def answer(self, body: Json, answer: Json) -> Json:
        meta = answer["meta_info"]
        if meta.get("image_tokens"):
            meta["prompt_tokens"] += meta["image_tokens"] - 1
            meta["image_tokens"] = 2 * meta["image_tokens"] - 1
        return answer


class OtherTokenizer(Fault):
    def answer(self, body: Json, answer: Json) -> Json:
        if "prompt_token_ids" in answer:
            answer["prompt_token_ids"] = [id_ + (id_ > 40) for id_ in answer["prompt_token_ids"]]
        return answer


def shift_all(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return [triples[0], *([*triple] for triple in triples[:-1])]


def shift_values(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    """Give each id its neighbour's log-prob, in every answer alike."""
    values = [None, *(triple[0] for triple in triples[2:]), -1.0]
    return [[value, *triple[1:]] for value, triple in zip(values, triples, strict=True)]


def shift_late_starts(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return shift_values(body, triples) if body["logprob_start_len"] else triples


def clip(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return [[value, id_ if id_ < 50 else 0, None] for value, id_, _ in triples]


def with_last(value: Any) -> Callable[[Json, list[list[Any]]], list[list[Any]]]:
    return lambda body, triples: [*triples[:-1], [value, *triples[-1][1:]]]


def tempered(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    warmth = body["sampling_params"].get("temperature", 1.0)
    return [[value and value / warmth, *rest] for value, *rest in triples]


def unsteady(body: Json, triples: list[list[Any]]) -> list[list[Any]]:
    return [[value and value - random.random() * 3, *rest] for value, *rest in triples]


class HidesPause(Hang):
    """Seems healthy, and lets `/generate` hang until it says that it is paused."""

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        await super().instead(request, body)
        return web.Response(status=503) if self.asked and request.path == "/ready" else None


class WithoutTokenIds(Fault):
    """Drops `return_prompt_token_ids`, as a typed gateway does."""

    def answer(self, body: Json, answer: Json) -> Json:
        answer.pop("prompt_token_ids", None)
        return answer


class TakesNoText(Fault):
    """Answers text as a server with --skip-tokenizer-init does."""

    async def instead(self, request: web.Request, body: Json | None) -> web.StreamResponse | None:
        if body is None or "text" not in body:
            return None
        return web.json_response({"error": {"message": "no tokenizer"}}, status=400)


HTML = "<!DOCTYPE html><html>a proxy's page</html>"

PLANTED: dict[str, tuple[Fault, str, str]] = {
    # name: the fault, the check that must find it first, the name that it must give
    "shifts ids by one": (Scores(shift_all), "text-receipt", "ids-shifted"),
    "re-tokenises": (Retokenises(), "text-receipt", "retokenised"),
    "clips ids to 0": (Scores(clip), "text-receipt", "ids-clipped"),
    "truncates": (Truncates(), "text-receipt", "truncated"),
    "cuts long samples": (CutsLongOnes(), "context", "truncated"),
    "drops the picture": (DropsPicture(), "image-receipt", "picture-dropped"),
    "expands pads itself": (ExpandsPads(), "image-receipt", "picture-refused"),
    "expands pads twice": (Counts(), "image-receipt", "expanded-twice"),
    "resizes pictures": (
        ChangesPictures(lambda image: image.resize((96, 96))),
        "image-receipt",
        "picture-resized",
    ),
    "resizes large pictures": (
        ChangesPictures(lambda image: image.resize((256, 256)) if image.width > 256 else image),
        "image-sizes",
        "picture-resized",
    ),
    "is blind": (
        ChangesPictures(lambda image: Image.new("RGB", image.size, (255, 255, 255))),
        "sees",
        "blind",
    ),
    "starts one late": (MovesStart(1), "text-receipt", "off-by-one"),
    "starts one early": (MovesStart(-1), "text-receipt", "off-by-one"),
    "shifts scores": (Scores(shift_values), "generation", "scores-wrong"),
    "shifts scores of late starts": (Scores(shift_late_starts), "start-len", "off-by-one"),
    "ignores the start": (MovesStart(-40), "text-receipt", "start-ignored"),
    "divides by the temperature": (Scores(tempered), "temperature", "temperature-applied"),
    "scores differently each time": (Scores(unsteady), "prefix-cache", "unsteady"),
    "answers null": (Scores(with_last(None)), "text-receipt", "null-scores"),
    "answers NaN": (Scores(with_last(float("nan"))), "text-receipt", "null-scores"),
    "answers positive log-probs": (Scores(with_last(0.5)), "text-receipt", "null-scores"),
    "answers short": (Scores(lambda body, triples: triples[:5]), "text-receipt", "short-answer"),
    "answers for another request": (AnswersAnother(), "text-receipt", "other-request"),
    "another tokenizer": (OtherTokenizer(), "vocabulary", "vocabulary-differs"),
    "answers 500": (Instead(500, "Internal Server Error"), "vocabulary", "http-500"),
    "answers 429": (Instead(429, '{"message": "queue full"}'), "vocabulary", "overloaded"),
    "answers HTML": (Instead(200, HTML, "text/html"), "vocabulary", "html-page"),
    "is a proxy's page": (Instead(404, HTML, "text/html", everywhere=True), "reachable", "html-page"),
    "is loading": (Instead(503, "", everywhere=True), "reachable", "not-ready"),
    "resets the connection": (Reset(), "vocabulary", "reset"),
    "wants a key": (Keyed(), "model", "key-missing"),
    "an embedding model": (Says("/model_info", is_generation=False), "model", "not-generative"),
    "a text-only teacher": (TextOnly(), "model", "text-only-teacher"),
    "--allow-auto-truncate": (Says("/server_info", allow_auto_truncate=True), "settings", "truncates"),
    "a short context": (Says("/v1/models", data=[{"max_model_len": 512}]), "context", "context-short"),
}
