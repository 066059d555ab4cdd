"""The engine's switchboard beside generation: who may run when, over pauses, updates and released memory."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.errors import NotServing
from slime.engines.transformers_engine.generation import Generator
from slime.engines.transformers_engine.memory import Memory, OccupationError

PauseMode = Literal["abort", "retract", "in_place"]
PAUSE_MODES: tuple[PauseMode, ...] = ("abort", "retract", "in_place")


class Control:
    """Event-loop side of the control endpoints. While its gate is closed, new requests wait before it."""

    def __init__(
        self, batcher: Batcher, generator: Generator, memory: Memory, model_path: str, served_name: str
    ):
        self.model_path = model_path
        self.served_name = served_name
        self._batcher = batcher
        self._generator = generator
        self._memory = memory
        self._gate = asyncio.Event()
        self._gate.set()
        self._paused = False
        self._update_lock = asyncio.Lock()
        self._idle = asyncio.Condition()
        self._in_flight = 0
        self._held = 0

    @property
    def paused(self) -> bool:
        """Whether generation is paused."""
        return self._paused

    @property
    def held(self) -> int:
        """Number of requests that wait for the end of a pause or of an update."""
        return self._held

    @property
    def _still(self) -> bool:
        """Whether requests in flight stand still: paused, or retracted while there is no memory for them."""
        return self._paused or self._memory.lacking() is not None

    @property
    def serving(self) -> bool:
        """Whether a request would be served now."""
        return not (self._batcher.failed or self._paused or self._memory.lacking())

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait while paused or updating, then count as in flight.

        Raises:
            NotServing: memory that the model needs is released.
        """
        self._held += 1
        try:
            await self._gate.wait()
        finally:
            self._held -= 1
        if lacking := self._memory.lacking():
            raise NotServing(lacking)
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            async with self._idle:
                self._idle.notify_all()

    async def pause(self, mode: PauseMode) -> None:
        """Hold new requests back; abort, retract or freeze the running ones."""
        self._paused = True
        self._gate.clear()
        if mode == "abort":
            self._generator.abort(None)
            await self._wait_until_idle()
        await asyncio.wrap_future(self._batcher.call(lambda: self._batcher.pause(retract=mode == "retract")))

    async def resume(self) -> None:
        """Go on after a pause."""
        await asyncio.wrap_future(self._batcher.call(self._batcher.resume))
        self._paused = False
        self._gate.set()

    async def flush(self, patience: float) -> bool:
        """Tell whether no request uses the cache, after up to `patience` seconds; more is not to flush."""
        if not self._paused:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience), self._idle:
                    await self._idle.wait_for(lambda: self._in_flight == 0)
        running = await asyncio.wrap_future(self._batcher.call(self._batcher.running))
        return running == 0 and (self._paused or self._in_flight == 0)

    async def release(self, tags: Sequence[str]) -> None:
        """Give memory back; raise OccupationError unless no request runs, or where it is back already."""
        async with self._update_lock:
            if self._in_flight and not self._still:
                raise OccupationError(
                    f"{self._in_flight} requests are in flight; pause, or let them end, then release memory."
                )
            with self._closed():
                await asyncio.wrap_future(self._batcher.call(lambda: self._memory.release(tags)))

    async def reoccupy(self, tags: Sequence[str]) -> None:
        """Take released memory again; raise OccupationError where it was not released."""
        async with self._update_lock:
            await asyncio.wrap_future(self._batcher.call(lambda: self._memory.resume(tags)))

    async def set_version(self, version: str, *, abort_all: bool) -> None:
        """Rename the current weights."""
        if abort_all:
            self._generator.abort(None)
        await asyncio.wrap_future(self._batcher.call(lambda: self._batcher.set_version(version)))

    @asynccontextmanager
    async def exclusive(self, abort_all: bool) -> AsyncIterator[None]:
        """Keep all other updates out, and requests too.

        Those in flight are finished (or aborted) first, unless they stand still, and new ones wait.
        """
        async with self._update_lock:
            if abort_all:
                self._generator.abort(None)
            with self._closed():
                if not self._still:
                    await self._wait_until_idle()
                yield

    @contextlib.contextmanager
    def _closed(self) -> Iterator[None]:
        self._gate.clear()
        try:
            yield
        finally:
            if not self._paused:
                self._gate.set()

    async def _wait_until_idle(self) -> None:
        async with self._idle:
            while self._in_flight:
                # Requests that were still being prepared when they were told to abort come up later.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), 1.0)
                if self._in_flight and self._paused:
                    self._generator.abort(None)
