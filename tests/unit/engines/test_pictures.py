"""Data URIs: no thread for what is at hand, one thread for what must be encoded."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from PIL import Image

from slime.engines import pictures
from slime.engines.pictures import data_uris
from slime.utils.pictures import EncodedPicture, encode_png, open_encoded, picture_uri


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which pictures become URIs."""
    names: list[str] = []

    def watched(source: Any) -> str:
        names.append(threading.current_thread().name)
        return picture_uri(source)

    monkeypatch.setattr(pictures, "picture_uri", watched)
    return names


def test_what_is_at_hand_needs_no_thread(threads: list[str]) -> None:
    encoded = EncodedPicture("hash", encode_png(Image.new("RGB", (32, 32))))
    images = [open_encoded(encoded), encoded.data_uri]
    assert asyncio.run(data_uris(images)) == [encoded.data_uri] * 2
    assert threads == ["MainThread"] * 2
    assert asyncio.run(data_uris([])) == []


def test_what_must_be_encoded_leaves_the_event_loop(threads: list[str]) -> None:
    encoded = EncodedPicture("hash", encode_png(Image.new("RGB", (32, 32))))
    uris = asyncio.run(data_uris([open_encoded(encoded), Image.new("RGB", (32, 32))]))
    assert uris == [encoded.data_uri] * 2
    assert "MainThread" not in threads
