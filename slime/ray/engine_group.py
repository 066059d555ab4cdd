"""The student's engines as the driver sees them: those of this run, and those that run elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.engines.control import EngineControl, MemoryTag
from slime.engines.errors import excerpt
from slime.ray.cluster import Cluster
from slime.ray.engine_actor import EngineActor
from slime.weight_sync.base import EngineMember

if TYPE_CHECKING:
    from slime.arguments import Args


@dataclass(frozen=True, kw_only=True)
class SharedGpus:
    """GPUs of training ranks that an engine shares, all of one node."""

    gpus: tuple[int, ...]
    scheduling: PlacementGroupSchedulingStrategy | None
    """Where those ranks are."""


class Engines(Protocol):
    """What the loop asks of the engines."""

    urls: list[str]

    def members(self) -> list[EngineMember]:
        """Return the engines once all of them answer."""
        ...

    def set_generating(self, generating: bool) -> None:
        """Say whether requests may come."""
        ...

    def start_anew(self) -> None:
        """End all engines that this run has, and start new ones."""
        ...

    def end(self) -> None:
        """End all engines that this run has, whatever they are doing."""
        ...


class EngineGroup:
    """Engines of this run, one actor each. Starting returns at once; `members` waits."""

    def __init__(self, cluster: Cluster, args: Args, shared: Sequence[SharedGpus] = ()) -> None:
        """`shared` are the GPUs of each engine, where they are training ranks' too."""
        self._cluster = cluster
        homes = [place.scheduling for place in shared]
        if not shared:
            homes = [None] * cluster.resources.num_engines
        self._actors: dict[str, Any] = {}
        for number, scheduling in enumerate(homes):
            name = f"engine_{number}"
            gpus = 0.0 if shared else cluster.resources.gpus_per_engine
            self._actors[name] = cluster.start_actor(
                name,
                EngineActor,
                args,
                number,
                not cluster.one_machine,
                num_gpus=gpus,
                scheduling=scheduling,
            )
        places: list[tuple[int, ...] | None] = [place.gpus for place in shared] or [None] * len(homes)
        self.urls: list[str] = cluster.wait(
            [actor.start.remote(gpus) for actor, gpus in zip(self._actors.values(), places, strict=True)]
        )
        if len(set(self.urls)) < len(self.urls):
            raise RuntimeError(
                f"two engines were given the same port ({', '.join(sorted(self.urls))}): both asked for a "
                "free one at the same moment. Start the run again."
            )
        for name, actor in self._actors.items():
            cluster.stop_at_end(actor)
            cluster.watch(name)

    def members(self) -> list[EngineMember]:
        """Return the engines once all of them answer, those too that are being started anew."""
        return self._everywhere("wait_ready")

    def set_generating(self, generating: bool) -> None:
        """Say whether requests may come; engines whose memory is released refuse."""
        self._everywhere("set_generating", generating)

    def start_anew(self) -> None:
        """End all engines, and start new ones; `members` waits for them."""
        self._everywhere("start_anew")

    def end(self) -> None:
        """End all engines, whatever they are doing."""
        self._cluster.end(list(self._actors))

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the idle engines give memory back."""
        self._everywhere("release_memory", tuple(tags))

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the engines take memory again."""
        self._everywhere("resume_memory", tuple(tags))

    def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        calls: list[ray.ObjectRef] = [
            getattr(actor, method).remote(*arguments) for actor in self._actors.values()
        ]
        return self._cluster.wait(calls)


class ExternalEngines:
    """Engines that run elsewhere: used, never started, watched or ended."""

    def __init__(self, args: Args) -> None:
        self.urls = list(args.rollout_engine_urls)
        self._patience = args.engine_start_timeout

    def members(self) -> list[EngineMember]:
        """Return the engines once all of them answer.

        Raises:
            RuntimeError: one of them does not, within `--engine-start-timeout`, or refuses our key.
        """
        infos = asyncio.run(self._server_info())
        sizes = [_tp_size(url, info) for url, info in zip(self.urls, infos, strict=True)]
        return [EngineMember(url=url, num_gpus=size) for url, size in zip(self.urls, sizes, strict=True)]

    def set_generating(self, generating: bool) -> None:
        """Do nothing: whoever started them looks after their health."""

    def start_anew(self) -> None:
        """Do nothing: whoever started them starts them again."""

    def end(self) -> None:
        """Do nothing: whoever started them ends them."""

    async def _server_info(self) -> list[dict[str, Any]]:
        remedy = "Start it, or correct the address in --rollout-engine-urls."
        async with EngineControl(
            self.urls, role="student engine", remedy=remedy, patience=self._patience
        ) as control:
            return await control.server_info()


def _tp_size(url: str, info: Any) -> int:
    size = info.get("tp_size", 1) if isinstance(info, dict) else None
    if type(size) is not int or size < 1:
        raise RuntimeError(
            f"the engine at {url} says of itself (/server_info) tp_size = {excerpt(size)}; a number of "
            "GPUs is needed. Is it an SGLang server, or one of ours?"
        )
    return size


class NoEngines:
    """A replay generates nothing."""

    def __init__(self) -> None:
        self.urls: list[str] = []

    def members(self) -> list[EngineMember]:
        """Return none."""
        return []

    def set_generating(self, generating: bool) -> None:
        """Do nothing."""

    def start_anew(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""
