"""`--deterministic-rollout`: which requests share a batch is settled before the first is sent.

The transformers engine admits the requests of a wave together and in order (its `custom_params`); here
samples are cut into waves that fit the requests in flight, and a wave is sent when the one before it has been
answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from slime.engines.client import EngineClient
from slime.engines.replicas import Endpoint
from slime.utils.types import Sample


class Wave:
    """Requests that one engine admits together."""

    def __init__(self, name: str, samples: Sequence[Sample]) -> None:
        self._name = name
        self._places = {id(sample): place for place, sample in enumerate(samples)}
        self._left = len(samples)
        self._open = asyncio.Event()
        self.next: Wave | None = None

    def open(self) -> None:
        """Let the members go."""
        self._open.set()

    @asynccontextmanager
    async def member(self) -> AsyncIterator[None]:
        """Wait for the wave's turn; when its last member leaves, the next wave's turn comes."""
        await self._open.wait()
        yield
        self._left -= 1
        if self._left == 0 and self.next is not None:
            self.next.open()

    def custom_params(self, sample: Sample) -> dict[str, Any]:
        """Return what the engine is told of a member."""
        place = {"wave": self._name, "wave_size": len(self._places), "order": self._places[id(sample)]}
        return {"custom_params": place}


def plan_waves(args: Any, samples: Sequence[Sample], client: EngineClient, label: str) -> dict[int, Wave]:
    """Return each sample's wave by the sample's `id()`. Every engine has its own chain, the first one
    open."""
    by_engine: dict[Endpoint, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.index or 0):
        by_engine.setdefault(client.endpoint_for(sample.group_index), []).append(sample)
    waves: dict[int, Wave] = {}
    for members in by_engine.values():
        before: Wave | None = None
        for number, chunk in enumerate(_chunks(members, args.rollout_concurrency)):
            wave = Wave(f"{label}/{number}", chunk)
            waves.update({id(sample): wave for sample in chunk})
            if before is None:
                wave.open()
            else:
                before.next = wave
            before = wave
    return waves


def _chunks(members: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [members[start : start + size] for start in range(0, len(members), size)]
