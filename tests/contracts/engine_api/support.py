"""What the engine contract tests share: the recorded exchanges, and a small client without retries."""

import asyncio
import base64
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.fakes.processes import wait_until

HERE = Path(__file__).parent
MODEL = HERE / "model_a"
PICTURES = HERE / "recordings"
IMAGE_PAD, VIDEO_PAD = 346, 347
PROMPT = [341, 312, 198, 343, 346, 344, 279, 265, 296, 334, 330, 283, 68, 13, 342, 198, 341, 286, 198]
TEXT_PROMPT = [341, 312, 198, 281, 284, 327, 258, 337, 315, 30, 342, 198]
NO_PADS = {str(IMAGE_PAD): -100.0, str(VIDEO_PAD): -100.0}
ENDLESS_TOKENS = 4000
"""Of a request that is to be running: all that the context takes, seconds of work for the fastest machine."""


def picture_uri(name: str) -> str:
    """Return a recorded picture as a data URI."""
    return "data:image/png;base64," + base64.b64encode((PICTURES / f"{name}.png").read_bytes()).decode()


def load_exchanges() -> dict[str, dict[str, Any]]:
    """Read the recordings by name, pictures filled in."""
    lines = (HERE / "recordings" / "exchanges.jsonl").read_text().splitlines()
    exchanges = [json.loads(line) for line in lines]
    return {e["name"]: e | {"request": _fill_in(e["request"])} for e in exchanges}


def _fill_in(value: Any) -> Any:
    if isinstance(value, list):
        return [_fill_in(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"picture", "form"}:
        return {key: _fill_in(item) for key, item in value.items()}
    path = PICTURES / f"{value['picture']}.png"
    forms = {
        "uri": picture_uri(value["picture"]),
        "base64": base64.b64encode(path.read_bytes()).decode(),
        "path": str(path),
        "file": f"file://{path}",
    }
    return forms[value["form"]]


@dataclass(frozen=True)
class Engine:
    """A running engine under test."""

    kind: str
    """transformers, sglang, or url for one that was given."""
    url: str
    admin_key: str | None

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        key = {"Authorization": f"Bearer {self.admin_key}"} if self.admin_key else {}
        return {"Content-Type": "application/json", **key}

    def ask(self, method: str, path: str, body: Any = None, *, patience: float = 120.0) -> tuple[int, Any]:
        """Send one request; return its status and its body, decoded if it is JSON. Raises TimeoutError."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=patience)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, self.headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json" and text
        return response.status, json.loads(text) if is_json else text

    def post(self, path: str, body: Any) -> Any:
        """Send a request that must succeed; return its body."""
        status, answer = self.ask("POST", path, body)
        assert status == 200, (status, answer)
        return answer

    def generate(self, **body: Any) -> Any:
        """Generate, successfully."""
        return self.post("/generate", body)

    def generate_many(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        """Send requests at the same time, each on its own connection; return the answers, all successful."""
        return asyncio.run(self._generate_many(bodies))

    async def _generate_many(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self.url, connector=connector, headers=self.headers) as session:

            async def one(body: dict[str, Any]) -> Any:
                async with session.post("/generate", json=body) as response:
                    assert response.status == 200, await response.text()
                    return await response.json()

            return await asyncio.gather(*(one(body) for body in bodies))

    def counts(self) -> dict[str, int]:
        """Forwards so far; only the transformers engine tells."""
        return self.ask("GET", "/server_info")[1]["internal_states"][0]

    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait for rows; only the transformers engine tells."""
        info = self.ask("GET", "/server_info")[1]
        return info["running_requests"], info["waiting_requests"]

    def held(self) -> int:
        """How many requests wait for the end of a pause; only the transformers engine tells."""
        return self.ask("GET", "/server_info")[1]["held_requests"]


@dataclass
class Running:
    """A request that has its first token and runs on. A thread reads its stream, so that nothing holds it."""

    engine: Engine
    rid: str
    _latest: str = ""
    """The answer so far, as JSON; empty before the first token."""
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def answer(self) -> dict[str, Any]:
        """What it has answered up to now, or in the end."""
        return json.loads(self._latest)

    @property
    def count(self) -> int:
        """How many tokens it has up to now."""
        return self.answer["meta_info"]["completion_tokens"]

    @property
    def ended(self) -> bool:
        """Whether the whole answer is there."""
        return self._ended.is_set()

    def wait_for(self, true: Callable[[dict[str, Any]], object], what: str) -> None:
        """Return once the answer is as wanted; fail if it takes two minutes, or if the answer ends before."""
        wait_until(lambda: self.ended or (self._latest and true(self.answer)), f"{self.rid}: {what}")
        assert self._latest, f"{self.rid} ended without an answer"
        assert true(self.answer), f"{self.rid} ended before it was so that {what}: {self.answer}"

    def go_on(self) -> None:
        """Return once it has tokens of forwards that begin now; it must not have ended by itself."""
        # What the stream shows can be older than this call. A request that comes now, and is answered with
        # two tokens, shared a forward with this one.
        params = {"max_new_tokens": 2, "ignore_eos": True, "logit_bias": NO_PADS}
        self.engine.generate(input_ids=TEXT_PROMPT, sampling_params=params)
        count = self.count
        self.wait_for(lambda answer: answer["meta_info"]["completion_tokens"] > count, f"it has over {count}")
        assert not self.ended, self.answer

    def wait_end(self) -> dict[str, Any]:
        """Return the whole answer once something has ended it."""
        wait_until(lambda: self.ended, f"{self.rid}: it ends")
        return self.answer

    def abort(self) -> dict[str, Any]:
        """End it, which by itself it had not done; return the whole answer."""
        assert self.engine.ask("POST", "/abort_request", {"rid": self.rid})[0] == 200
        answer = self.wait_end()
        assert answer["meta_info"]["finish_reason"]["type"] == "abort", answer
        return answer

    def read(self, response: http.client.HTTPResponse) -> None:
        """Read the stream to its end."""
        try:
            for line in response:
                event = line.decode().strip().removeprefix("data: ")
                if event and event != "[DONE]":
                    self._latest = event
        finally:
            self._ended.set()


@contextmanager
def running_request(engine: Engine, rid: str, **body: Any) -> Iterator[Running]:
    """Give a request that runs: it has a token, and far too many before it to have ended when it is used."""
    params = {"max_new_tokens": ENDLESS_TOKENS, "ignore_eos": True, "logit_bias": NO_PADS}
    given = {"input_ids": TEXT_PROMPT, "sampling_params": params, "rid": rid, "stream": True, **body}
    parts = urlsplit(engine.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120.0)
    connection.request("POST", "/generate", json.dumps(given), engine.headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    running = Running(engine, rid)
    reader = threading.Thread(target=running.read, args=(response,), daemon=True)
    reader.start()
    try:
        running.wait_for(lambda answer: answer["output_ids"], "it has a token")
        yield running
    finally:
        if not running.ended:
            engine.ask("POST", "/abort_request", {"rid": rid})
        reader.join(60.0)
        connection.close()


def output_logprobs(answer: dict[str, Any]) -> list[float]:
    """Log-probs of the generated tokens."""
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def input_logprobs(answer: dict[str, Any]) -> list[float | None]:
    """Log-probs of the reported prompt tokens, the first of them null."""
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"]]


def save_changed_model(folder: Path, scale: float = 0.3, *, seed: int = 7) -> Path:
    """Write the recorded model with every weight changed, in the vision tower too; another `seed`, others."""
    folder.mkdir(parents=True)
    for file in MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(MODEL / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    changed = {
        name: (w.float() + scale * w.float().std() * torch.randn(w.shape, generator=generator)).to(w.dtype)
        for name, w in weights.items()
    }
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def drawn_picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Return a picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
