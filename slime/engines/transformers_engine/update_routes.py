"""Routes of weight updates and of memory: bodies in, answers out."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from slime.engines.transformers_engine.bodies import (
    done,
    json_response,
    optional_str,
    read_object,
    refused,
    required_int,
    required_shapes,
    required_str,
    required_strings,
    wrong,
)
from slime.engines.transformers_engine.control import Control
from slime.engines.transformers_engine.errors import InvalidValue
from slime.engines.transformers_engine.memory import TAGS, OccupationError
from slime.engines.transformers_engine.weight_group import Broadcast, GroupPlace
from slime.engines.transformers_engine.weight_updates import UpdateOptions, UpdateRefusedError, WeightUpdates

FLAT = "flattened_bucket"
MAX_RANKS = 2**20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class UpdateRoutes:
    """Handlers of the verbs that a trainer uses."""

    def __init__(self, control: Control, updates: WeightUpdates):
        self._control = control
        self._updates = updates

    def by_path(self) -> dict[str, Handler]:
        """Return the handlers of POST."""
        return {
            "/update_weights_from_disk": self.from_disk,
            "/update_weight_version": self.update_version,
            "/begin_weight_update": self.begin,
            "/end_weight_update": self.end,
            "/update_weights_from_tensor": self.from_tensors,
            "/update_weights_from_distributed": self.from_broadcast,
            "/init_weights_update_group": self.join_group,
            "/destroy_weights_update_group": self.leave_group,
            "/get_weights_by_name": self.get_weights,
            "/weights_checker": self.unsupported,
            "/release_memory_occupation": self.release,
            "/resume_memory_occupation": self.resume,
        }

    async def from_disk(self, request: web.Request) -> web.Response:
        """Load a checkpoint's weights in place of the served ones."""
        body = await read_object(request)
        answer = await self._updates.from_disk(required_str(body, "model_path"), _options(body))
        return json_response(answer, 200 if answer["success"] else 400)

    async def update_version(self, request: web.Request) -> web.Response:
        """Rename the served weights; aborts what runs unless told not to."""
        body = await read_object(request)
        version = required_str(body, "new_version")
        await self._control.set_version(version, abort_all=body.get("abort_all_requests", True))
        message = f"Weight version updated to {version}"
        return json_response({"success": True, "message": message, "new_version": version})

    async def begin(self, request: web.Request) -> web.Response:
        """Open a weight-update session."""
        await read_object(request)
        try:
            self._updates.begin()
        except UpdateRefusedError as error:
            return refused(str(error))
        return done()

    async def end(self, request: web.Request) -> web.Response:
        """Close the weight-update session."""
        await read_object(request)
        try:
            self._updates.end()
        except UpdateRefusedError as error:
            return refused(str(error))
        return done()

    async def from_tensors(self, request: web.Request) -> web.Response:
        """Copy weights out of the memory of a trainer on this machine."""
        body = await read_object(request)
        payloads, load_format = required_strings(body, "serialized_named_tensors"), body.get("load_format")
        if len(payloads) != 1:
            raise wrong("serialized_named_tensors", "one payload is required, for the one rank", payloads)
        if load_format is not None:
            return refused(f"load_format {load_format!r} is not supported; send named tensors and null.")
        return await self._answered(self._updates.from_tensors(payloads[0], _options(body)))

    async def from_broadcast(self, request: web.Request) -> web.Response:
        """Receive weights from a group's trainer, which broadcasts them while this request is open."""
        body = await read_object(request)
        load_format = body.get("load_format")
        if load_format not in (None, FLAT):
            return refused(f"load_format {load_format!r} is not supported; use null or {FLAT!r}.")
        broadcast = Broadcast(
            group=_group_name(body),
            names=required_strings(body, "names"),
            dtypes=required_strings(body, "dtypes"),
            shapes=required_shapes(body, "shapes"),
            flat=load_format == FLAT,
        )
        if not broadcast.names or not len(broadcast.names) == len(broadcast.dtypes) == len(broadcast.shapes):
            raise wrong(
                "names",
                f"as many names as dtypes ({len(broadcast.dtypes)}) and shapes ({len(broadcast.shapes)}) are "
                "required, at least one",
                broadcast.names,
            )
        return await self._answered(self._updates.from_broadcast(broadcast, _options(body)))

    async def join_group(self, request: web.Request) -> web.Response:
        """Join a trainer's process group; answered when all have joined."""
        body = await read_object(request)
        place = GroupPlace(
            name=_group_name(body),
            address=required_str(body, "master_address"),
            port=required_int(body, "master_port", 1, 65_535),
            rank=required_int(body, "rank_offset", 1, MAX_RANKS),
            world_size=required_int(body, "world_size", 2, MAX_RANKS),
            backend=optional_str(body, "backend") or "nccl",
        )
        if place.rank >= place.world_size:
            needed = f"a rank below the world size of {place.world_size} is required"
            raise wrong("rank_offset", needed, place.rank)
        try:
            await self._updates.join(place)
        except UpdateRefusedError as error:
            return refused(str(error))
        return done("Succeeded to initialize custom process group.")

    async def leave_group(self, request: web.Request) -> web.Response:
        """Leave a trainer's process group."""
        body = await read_object(request)
        try:
            await self._updates.leave(_group_name(body))
        except UpdateRefusedError as error:
            return refused(str(error))
        return done("Succeeded to destroy custom process group.")

    async def release(self, request: web.Request) -> web.Response:
        """Give memory back."""
        return await self._occupy(request, self._control.release)

    async def resume(self, request: web.Request) -> web.Response:
        """Take memory again."""
        return await self._occupy(request, self._control.reoccupy)

    async def get_weights(self, request: web.Request) -> web.Response:
        """Refused for Qwen3-VL by the real server too."""
        raise InvalidValue("Get parameter by name failed")

    async def unsupported(self, request: web.Request) -> web.Response:
        """Refuse what only a real SGLang server can do."""
        return refused(f"{request.path} is not supported by the transformers engine; use an SGLang server.")

    async def _answered(self, update: Awaitable[dict[str, Any]]) -> web.Response:
        try:
            answer = await update
        except UpdateRefusedError as error:
            return refused(str(error))
        return json_response(answer, 200 if answer["success"] else 400)

    async def _occupy(
        self, request: web.Request, verb: Callable[[Sequence[str]], Awaitable[None]]
    ) -> web.Response:
        body = await read_object(request)
        tags = required_strings(body, "tags") if body.get("tags") else list(TAGS)
        if unknown := [tag for tag in tags if tag not in TAGS]:
            return refused(f"there is no memory {unknown[0]!r}; tags are {', '.join(TAGS)}.")
        try:
            await verb(tags)
        except OccupationError as error:
            return refused(str(error))
        return json_response(None)


def _options(body: dict[str, Any]) -> UpdateOptions:
    return UpdateOptions(
        version=optional_str(body, "weight_version"),
        abort_all=bool(body.get("abort_all_requests")),
        flush=bool(body.get("flush_cache", True)),
    )


def _group_name(body: dict[str, Any]) -> str:
    name = body.get("group_name", "weight_update_group")
    if not isinstance(name, str) or not name:
        raise wrong("group_name", "a name is required", name)
    return name
