"""The engine's switchboard beside generation: pause and continue, abort, weight updates, versions."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from safetensors import SafetensorError

from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.generation import Generator

PauseMode = Literal["abort", "retract", "in_place"]
PAUSE_MODES: tuple[PauseMode, ...] = ("abort", "retract", "in_place")
NOT_FLUSHED = "Weights were updated, but the cache was not flushed, because requests are running."
logger = logging.getLogger(__name__)


class Control:
    """Event-loop side of the control endpoints. While its gate is closed, new requests wait before it."""

    def __init__(self, batcher: Batcher, generator: Generator, model_path: str, served_name: str):
        self.model_path = model_path
        self.served_name = served_name
        self._batcher = batcher
        self._generator = generator
        self._gate = asyncio.Event()
        self._gate.set()
        self._paused = False
        self._update_lock = asyncio.Lock()
        self._idle = asyncio.Condition()
        self._in_flight = 0
        self.session_open = False

    @property
    def paused(self) -> bool:
        """Whether generation is paused."""
        return self._paused

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait while paused or updating, then count as in flight."""
        await self._gate.wait()
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

    async def update_weights(
        self, path: str, version: str | None, *, abort_all: bool, flush: bool
    ) -> dict[str, Any]:
        """Replace the weights by a checkpoint's; on any failure the old ones stay. Return the answer's body.

        Unless generation is paused, requests in flight are finished (or aborted) first and new ones wait.
        """
        async with self._update_lock, self._exclusive(abort_all):
            try:
                weights = await asyncio.to_thread(self._batcher.model.read_weights, path)
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
                logger.warning("weights of %s were refused: %s", path, error)
                message = f"Failed to update weights from {path}: {error}. The old weights stay."
                return {"success": False, "message": message, "num_paused_requests": 0}

            def write() -> int:
                self._batcher.model.write_weights(weights)
                if version is not None:
                    self._batcher.set_version(version)
                return self._batcher.running()

            running = await asyncio.wrap_future(self._batcher.call(write))
            self.model_path = self.served_name = path
            if running and flush:
                return {"success": False, "message": NOT_FLUSHED, "num_paused_requests": running}
            message = "Succeeded to update model weights."
            if version is not None:
                message += f" Weight version updated to {version}."
            return {"success": True, "message": message, "num_paused_requests": running}

    async def set_version(self, version: str, *, abort_all: bool) -> None:
        """Rename the current weights."""
        if abort_all:
            self._generator.abort(None)
        await asyncio.wrap_future(self._batcher.call(lambda: self._batcher.set_version(version)))

    @asynccontextmanager
    async def _exclusive(self, abort_all: bool) -> AsyncIterator[None]:
        if abort_all:
            self._generator.abort(None)
        if self._paused:
            yield
            return
        self._gate.clear()
        try:
            await self._wait_until_idle()
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
