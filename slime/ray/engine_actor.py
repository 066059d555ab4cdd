"""One of the student's engines: a server process on this node, started, watched, restarted, ended.

Requests go past it, from the rollout actor to the server. It says to its server alone what concerns its
memory, because only it knows that nobody must ask a server for its health whose memory is gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import ray

from slime.ray.actor import Actor, Surroundings, log_path
from slime.ray.keeper import Keeper, Limits

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.engines.control import EngineControl, MemoryTag
    from slime.engines.process import ServerProcess
    from slime.weight_sync.base import EngineMember


class EngineActor(Actor):
    """Owns one server."""

    def __init__(self, args: Args, number: int, several_nodes: bool, surroundings: Surroundings) -> None:
        """`several_nodes` says whether who asks the server may be on another machine."""
        self.name = f"engine_{number}"
        super().__init__(f"{self.name}_actor", surroundings)
        self._args = args
        self._host = ray.util.get_node_ip_address() if several_nodes else "127.0.0.1"
        self._gpus: list[int] | None = None
        self._port = 0
        self._keeper: Keeper | None = None

    def start(self, gpus: Sequence[int] | None = None) -> str:
        """Start the server and return its URL at once; `wait_ready` waits for it.

        `gpus` are the node's that it shares with training ranks; None: those that Ray gave this actor.

        Raises:
            ValueError: a --sglang-* flag is none of the installed SGLang's.
        """
        from slime.engines.process import free_port
        from slime.engines.sglang_flags import check_sglang_flags

        if gpus is None:
            gpus = [int(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]
        self._gpus = list(gpus) or None
        check_sglang_flags(self._args.sglang_command_line(), gpus=self._gpus, env=os.environ)
        self._port = free_port(self._host)
        limits = Limits(
            restarts=self._args.engine_restarts,
            start_timeout=self._args.engine_start_timeout,
            check_interval=self._args.rollout_health_check_interval,
            check_timeout=self._args.rollout_health_check_timeout,
        )
        self._keeper = Keeper(self.name, self._launch, limits)
        return self._keeper.current.server.url

    def wait_ready(self) -> EngineMember:
        """Return once the server answers, also one that has just been started anew.

        Raises:
            RuntimeError: it died or took too long; the message ends with its log.
        """
        from slime.weight_sync.base import EngineMember

        current = self._ready().wait_ready()
        return EngineMember(
            url=current.server.url, num_gpus=len(self._gpus or [0]), incarnation=current.number
        )

    @ray.method(concurrency_group="control")
    def watch(self) -> None:
        """Start the server anew when it dies or hangs; return after `stop`.

        Raises:
            RuntimeError: it died once more than `--engine-restarts` allows, or before it ever answered; the
                message ends with its log.
        """
        self._ready().watch()

    @ray.method(concurrency_group="control")
    def set_generating(self, generating: bool) -> None:
        """Say whether requests may come: only then the server's health is checked.

        Raises:
            RuntimeError: memory that it needs to generate is released.
        """
        self._ready().set_generating(generating)

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the idle server give memory back; one that is being started anew is waited for."""

        async def release(control: EngineControl) -> None:
            await control.flush_cache()
            await control.release_memory(tags)

        with self.stopwatch.stage("release memory"):
            current = self._ready().wait_ready()
            self._control(release)
            current.released.update(tags)

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the server take memory again. One that has died meanwhile is started anew, with all of it."""
        with self.stopwatch.stage("resume memory"):
            current = self._ready().wait_ready()
            # A new server has released nothing.
            asked: list[MemoryTag] = [tag for tag in tags if tag in current.released]
            if asked:
                self._control(lambda control: control.resume_memory(asked))
                current.released.difference_update(asked)

    def start_anew(self) -> None:
        """End the server and start the next one in its place; `wait_ready` waits for it."""
        self._ready().start_anew()

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End the server with all that it started."""
        if self._keeper is not None:
            self._keeper.stop()

    def _launch(self) -> ServerProcess:
        from slime.engines.process import start_server

        args = self._args
        return start_server(
            args.engine,
            args.hf_checkpoint,
            self._port,
            log_path(args.output_dir, self.name),
            host=self._host,
            tp=args.rollout_num_gpus_per_engine if self._gpus else 1,
            gpus=self._gpus,
            dtype=args.engine_dtype or args.precision,
            threads=args.engine_threads,
            extra_args=server_flags(args),
            role="student",
        )

    def _control(self, verb: Callable[[EngineControl], Awaitable[None]]) -> None:
        from slime.engines.control import EngineControl

        async def say() -> None:
            async with EngineControl([self._ready().current.server.url], role=self.name) as control:
                await verb(control)

        asyncio.run(say())

    def _ready(self) -> Keeper:
        if self._keeper is None:
            raise RuntimeError(f"{self.name} has no server yet; call start() first")
        return self._keeper


def server_flags(args: Args) -> list[str]:
    """Return what the arguments ask of a server beyond model, address and size."""
    flags = args.sglang_command_line()
    if args.engine == "sglang":
        return ["--enable-memory-saver", *flags] if args.colocate else flags
    return ["--deterministic"] if args.deterministic_rollout else []
