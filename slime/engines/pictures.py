"""Pictures on their way to a server: PNG data URIs, made off the event loop.

A prepared picture has its URI already, so that the student's engine, the teacher and every sample of a group
send the same bytes at no cost; servers key their caches by them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from slime.utils.pictures import is_at_hand, picture_uri


async def data_uris(images: Sequence[Any]) -> list[str]:
    """Return the pictures as data URIs; a thread makes what is not at hand, which takes milliseconds."""
    if all(is_at_hand(image) for image in images):
        return [picture_uri(image) for image in images]
    return await asyncio.to_thread(lambda: [picture_uri(image) for image in images])
