"""Pictures on their way to a server: PNG data URIs, made off the event loop.

A prepared picture carries its PNG, so that the student's engine, the teacher and every sample of a group send
the same bytes; servers key their caches by them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from slime.utils.processing_utils import encode_image_for_rollout_engine


async def data_uris(images: Sequence[Any]) -> list[str]:
    """Encode pictures; one that was never encoded costs many milliseconds, so a thread does it."""
    if not images:
        return []
    return await asyncio.to_thread(lambda: [encode_image_for_rollout_engine(image) for image in images])
