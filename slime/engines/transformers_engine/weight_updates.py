"""Replacing the served weights: from a folder, from a trainer's memory on this machine, or over a group.

Event-loop side. What is read or received lies beside the served weights until it is whole and fits; only then
does the model thread write it.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.control import Control
from slime.engines.transformers_engine.memory import Memory
from slime.engines.transformers_engine.weight_group import Broadcast, GroupPlace, UpdateGroups
from slime.engines.transformers_engine.weight_payload import read_payload
from slime.engines.update_group import in_own_thread

NOT_FLUSHED = "Weights were updated, but the cache was not flushed, because requests are running."
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)
"""What reading or receiving weights ends in."""
logger = logging.getLogger(__name__)


class UpdateRefusedError(Exception):
    """An update that was not done; the old weights stay."""


@dataclass(frozen=True)
class UpdateOptions:
    """What every kind of update takes."""

    version: str | None
    """Name of the weights from here on; None keeps the old one."""
    abort_all: bool
    """Abort the requests in flight instead of waiting for them."""
    flush: bool
    """Whether requests that run on, with keys and values of the old weights, make the update a failure."""


class WeightUpdates:
    """The update verbs. Unless generation is paused, each lets requests in flight end first; others wait."""

    def __init__(self, batcher: Batcher, control: Control, memory: Memory, groups: UpdateGroups):
        self._batcher = batcher
        self._control = control
        self._memory = memory
        self._groups = groups
        self._session_open = False

    def begin(self) -> None:
        """Open a session for updates in parts; raise UpdateRefusedError where one is open."""
        if self._session_open:
            raise UpdateRefusedError(
                "a weight-update session is already open; call end_weight_update() first"
            )
        self._session_open = True

    def end(self) -> None:
        """Close the session; raise UpdateRefusedError where none is open."""
        if not self._session_open:
            raise UpdateRefusedError("no weight-update session is open; call begin_weight_update() first")
        self._session_open = False

    async def from_disk(self, path: str, options: UpdateOptions) -> dict[str, Any]:
        """Take a checkpoint folder's weights, all or none; return the answer's body."""
        try:
            running = await self._update(lambda: self._batcher.model.read_weights(path), options)
        except UpdateRefusedError as error:
            logger.warning("weights of %s were refused: %s", path, error)
            message = f"Failed to update weights from {path}: {error}. The old weights stay."
            return {"success": False, "message": message, "num_paused_requests": 0}
        self._control.model_path = self._control.served_name = path
        body = _outcome("Succeeded to update model weights.", running, options)
        return body | {"num_paused_requests": running}

    async def from_tensors(self, payload: str, options: UpdateOptions) -> dict[str, Any]:
        """Take weights by reference; return the answer's body. Raise UpdateRefusedError."""
        self._require_session("update_weights_from_tensor")
        device = self._batcher.model.device
        running = await self._update(lambda: self._fitting(read_payload(payload, device)), options)
        return _outcome("Success", running, options)

    async def from_broadcast(self, broadcast: Broadcast, options: UpdateOptions) -> dict[str, Any]:
        """Take weights that a group's trainer sends; return the answer's body. Raise UpdateRefusedError."""
        self._require_session("update_weights_from_distributed")
        running = await self._update(lambda: self._fitting(self._groups.receive(broadcast)), options)
        return _outcome("Succeeded to update parameter online.", running, options)

    async def join(self, place: GroupPlace) -> None:
        """Join a trainer's group, waiting for it; raise UpdateRefusedError."""
        try:
            await in_own_thread(lambda: self._groups.join(place))
        except UNREADABLE as error:
            raise UpdateRefusedError(f"Failed to initialize custom process group: {error}") from error

    async def leave(self, name: str) -> None:
        """Leave a group; raise UpdateRefusedError where there is none."""
        try:
            await in_own_thread(lambda: self._groups.leave(name))
        except KeyError as error:
            raise UpdateRefusedError("The group to be destroyed does not exist.") from error

    def _require_session(self, verb: str) -> None:
        if not self._session_open:
            raise UpdateRefusedError(f"{verb} must run between begin_weight_update() and end_weight_update()")

    def _fitting(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        self._batcher.model.check_part(weights)
        return weights

    async def _update(self, read: Callable[[], dict[str, Tensor]], options: UpdateOptions) -> int:
        """Read weights and write them; return how many requests run on. Raise UpdateRefusedError."""
        async with self._control.exclusive(options.abort_all):
            if self._memory.weights_released:
                raise UpdateRefusedError(
                    "the memory of weights is released; call /resume_memory_occupation first"
                )
            try:
                weights = await in_own_thread(read)
            except UNREADABLE as error:
                raise UpdateRefusedError(str(error)) from error

            def write() -> int:
                self._batcher.model.write_weights(weights)
                self._memory.written(weights)
                if options.version is not None:
                    self._batcher.set_version(options.version)
                return self._batcher.running()

            return await asyncio.wrap_future(self._batcher.call(write))


def _outcome(message: str, running: int, options: UpdateOptions) -> dict[str, Any]:
    if running and options.flush:
        return {"success": False, "message": NOT_FLUSHED}
    if options.version is not None:
        message += f" Weight version updated to {options.version}."
    return {"success": True, "message": message}
