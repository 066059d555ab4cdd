"""What a real server is held against: transformers' own forward pass of the same checkpoint, and plain HTTP.

For the tests marked `sglang`. It shares nothing with the engines but `start_server`, so that no error is on
both sides.
"""

import base64
import io
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from slime.engines.process import ServerProcess, free_port, start_server
from slime.engines.sglang_engine import Role, sglang_python

MODEL = Path(__file__).parent / "engine_api" / "model_a"
START_SECONDS = 500
TOLERANCE = 1e-3


class Reference:
    """One checkpoint under transformers in float32: the numbers that a server must give."""

    def __init__(self, path: Path) -> None:
        sees = hasattr(AutoConfig.from_pretrained(path), "vision_config")
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.model = kind.from_pretrained(path, dtype=torch.float32).eval()
        self.image_processor: Any = AutoImageProcessor.from_pretrained(path, backend="pil") if sees else None
        self.image_token = self.model.config.image_token_id if sees else None

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], images: Sequence[Image.Image] = ()) -> torch.Tensor:
        """Return [T, V] logits of `tokens`, with one pad per image, at the unexpanded positions."""
        if not images:
            return self.model(input_ids=torch.tensor([tokens])).logits[0]
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        areas = iter((pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        counts = [next(areas) if token == self.image_token else 1 for token in tokens]
        expanded = torch.tensor(tokens).repeat_interleave(torch.tensor(counts))[None]
        kinds = (expanded == self.image_token).long()
        logits = self.model(input_ids=expanded, mm_token_type_ids=kinds, **pixels).logits[0]
        return logits[torch.tensor(counts).cumsum(0) - 1]

    def log_probs(self, tokens: Sequence[int], images: Sequence[Image.Image], last: int) -> torch.Tensor:
        """Return [last] log-probs of the last tokens."""
        log_probs = self.logits(tokens, images).log_softmax(-1)[-last - 1 : -1]
        return log_probs.gather(-1, torch.tensor(tokens[-last:])[:, None])[:, 0]

    def greedy(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        images: Sequence[Image.Image],
        never: Sequence[int],
    ) -> tuple[list[int], torch.Tensor]:
        """Return the most likely token, none of `never`, after each prefix of `response`, and [R] log-probs.

        A response is the greedy one exactly if it is these tokens.
        """
        logits = self.logits([*prompt, *response], images)[len(prompt) - 1 : -1]
        logits[:, torch.tensor(never)] -= 100.0
        best = logits.log_softmax(-1).max(-1)
        return best.indices.tolist(), best.values


class Http:
    """Plain requests to one server."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server

    def __call__(self, path: str, body: Any = None, key: str | None = None) -> tuple[int, str]:
        """Return status and text of a GET, or of a POST where there is a body; `key` goes into the header."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.server.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def control(self, path: str, body: Any = None) -> str:
        """Use a control endpoint with the server's own key; any answer but 200 fails."""
        status, text = self(path, body, self.server.admin_key)
        assert status == 200, text
        return text

    def update_weights(self, path: Path, version: str) -> None:
        """Change the weights in the order that is safe: pause, update, flush, continue."""
        self.control("/pause_generation", {"mode": "retract"})
        self.control("/update_weights_from_disk", {"model_path": str(path), "weight_version": version})
        self.control("/flush_cache")
        self.control("/continue_generation", {})

    def generate(
        self, tokens: Sequence[int], images: Sequence[Image.Image] = (), **fields: Any
    ) -> dict[str, Any]:
        """Post one request; any answer but 200 fails."""
        body = {"input_ids": list(tokens), "return_logprob": True, **fields}
        if images:
            body["image_data"] = [data_uri(image) for image in images]
        status, text = self("/generate", body)
        assert status == 200, text
        return json.loads(text)

    def score(
        self, tokens: Sequence[int], images: Sequence[Image.Image], last: int, start: int = 0
    ) -> torch.Tensor:
        """Return [last] log-probs of the last tokens; `start` is an index into the expanded tokens."""
        sampling = {"max_new_tokens": 0, "temperature": 0}
        answer = self.generate(tokens, images, logprob_start_len=start, sampling_params=sampling)
        triples = answer["meta_info"]["input_token_logprobs"][-last:]
        assert [token for _, token, _ in triples] == list(tokens[-last:])
        return torch.tensor([log_prob for log_prob, _, _ in triples])


def data_uri(image: Image.Image) -> str:
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()


def picture(width: int, height: int, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")


@contextmanager
def running_sglang(model: Path, log: Path, role: Role) -> Iterator[ServerProcess]:
    """Serve `model` until the block ends; then fail if a process or a port of the server is left.

    Fail at once, with the remedy, where SGLang's environment is not there.
    """
    python = sglang_python(os.environ, on_cpu=True)
    assert Path(python).exists(), f"{python} is missing; run `bash scripts/setup.sh --sglang-cpu`"
    with start_server("sglang", str(model), free_port(), log, role=role) as server:
        server.wait_ready(START_SECONDS)
        yield server
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        sockets = [connection for member in family for connection in member.net_connections("tcp")]
        ports = {connection.laddr.port for connection in sockets if connection.status == psutil.CONN_LISTEN}
    assert len(family) > 2
    assert int(server.url.rsplit(":", 1)[1]) in ports
    assert not [member for member in family if member.is_running()]
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
