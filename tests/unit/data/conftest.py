"""Pictures, files and arguments that the data tests share; the processor is the shipped tiny student's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from slime.arguments import Args, parse_args
from slime.tiny.paths import checkpoint_path
from slime.utils.processing_utils import load_processor


@pytest.fixture(scope="session")
def processor() -> Any:
    return load_processor(checkpoint_path("student"))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_noise() -> Callable[..., Image.Image]:
    return noise


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture(scope="session")
def make_row() -> Callable[..., dict[str, Any]]:
    """Return a good row in geo3k's schema."""

    def row(number: int = 0, **changes: Any) -> dict[str, Any]:
        picture = {"bytes": encoded(noise(70 + number, 66, number)), "path": None}
        return {"problem": f"<image>What is {number}?", "answer": str(number), "images": [picture], **changes}

    return row


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., str]:
    """Write rows to a parquet file and return its path."""

    def write(rows: Sequence[dict[str, Any]], name: str = "train.parquet") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return str(path)

    return write


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows (or raw lines) to a jsonl file and return its path."""

    def write(rows: Sequence[dict[str, Any] | str], name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def make_args() -> Callable[..., Args]:
    """Return checked arguments for a data set, with more flags behind."""

    def make(source: str, *flags: str) -> Args:
        return parse_args(
            [
                *(
                    "--hf-checkpoint",
                    str(checkpoint_path("student")),
                    "--prompt-data",
                    source,
                    "--num-rollout",
                    "1",
                ),
                *("--rm-type", "math", "--apply-chat-template", "--n-samples-per-prompt", "2", *flags),
            ]
        )

    return make
