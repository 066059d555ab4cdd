"""What the engine contract tests share: the recorded exchanges, and a small client without retries."""

import asyncio
import base64
import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
MODEL = HERE / "model_a"
PICTURES = HERE / "recordings"
IMAGE_PAD, VIDEO_PAD = 346, 347
PROMPT = [341, 312, 198, 343, 346, 344, 279, 265, 296, 334, 330, 283, 68, 13, 342, 198, 341, 286, 198]
TEXT_PROMPT = [341, 312, 198, 281, 284, 327, 258, 337, 315, 30, 342, 198]
NO_PADS = {str(IMAGE_PAD): -100.0, str(VIDEO_PAD): -100.0}


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

    def ask(self, method: str, path: str, body: Any = None, *, patience: float = 60.0) -> tuple[int, Any]:
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
