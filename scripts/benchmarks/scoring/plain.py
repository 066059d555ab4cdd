"""The plain way to ask a teacher, as public recipes do it: the baseline, no faster and no slower than that.

One HTTP session a call, the picture encoded for every call on the event loop, `logprob_start_len` 0, the
answer parsed by the session, all triples walked through, the end of the list cut off. It checks nothing, and
waits for nothing but the answer.
"""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import aiohttp
import torch
from PIL import Image

from scripts.benchmarks.scoring.workload import Group


def encode(image: Image.Image) -> str:
    """Return the picture as a PNG data URI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("utf-8")


async def ask(url: str, tokens: list[int], images: list[Image.Image]) -> Any:
    """Return the teacher's whole answer about `tokens`."""
    payload: dict[str, Any] = {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
        "image_data": [encode(image) for image in images],
    }
    # aiohttp's own limit of 5 minutes is not the recipe's choice; a slow server on a CPU would meet it
    limits = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=limits) as session, session.post(url, json=payload) as response:
        response.raise_for_status()
        return await response.json()


def log_probs(answer: Any, response_length: int) -> torch.Tensor:
    """Return the log-probs of the response, float32 [R]."""
    entries = answer["meta_info"]["input_token_logprobs"]
    return torch.tensor([entry[0] for entry in entries[1:]], dtype=torch.float32)[-response_length:]


class PlainClient:
    """Scores groups the plain way."""

    def __init__(self, url: str) -> None:
        self._url = url + "/generate"

    async def ask(self, groups: list[Group]) -> list[tuple[Any, int]]:
        """Ask about all samples at once; return (answer, R) in the order of the groups."""
        calls = [
            ask(self._url, [*group.prompt, *response], [group.picture])
            for group in groups
            for response in group.responses
        ]
        answers = await asyncio.gather(*calls)
        lengths = [len(response) for group in groups for response in group.responses]
        return list(zip(answers, lengths, strict=True))

    def finish(self, asked: list[tuple[Any, int]]) -> list[torch.Tensor]:
        """Make the tensors, once all answers are there."""
        return [log_probs(answer, length) for answer, length in asked]

    def entries(self, asked: list[tuple[Any, int]]) -> list[int]:
        """Return how many entries each answer's list holds."""
        return [len(answer["meta_info"]["input_token_logprobs"]) for answer, _ in asked]

    async def close(self) -> None:
        """Nothing is kept open."""
