"""One of the student's engines: a server process on this node, started, watched, restarted, ended.

Requests go past it, from the rollout actor to the server. It says to its server alone what concerns its
memory, because only it knows that nobody must ask a server for its health whose memory is gone.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray

from slime.ray.actor import Actor, Surroundings, log_path

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.engines.control import EngineControl, MemoryTag
    from slime.engines.process import ServerProcess
    from slime.weight_sync.base import EngineMember

WATCH_SECONDS = 0.5
FAILED_CHECKS = 3
"""Health checks in a row that an engine may not answer before it counts as hanging."""


@dataclass
class Incarnation:
    """A server process, and the how-manieth it is."""

    server: ServerProcess
    number: int
    ready: bool = False
    released: set[MemoryTag] = field(default_factory=set)
    """Which of its memory it has given back."""


class EngineActor(Actor):
    """Owns one server."""

    def __init__(self, args: Args, number: int, host: str, surroundings: Surroundings) -> None:
        """`host` is the address that the server binds to, as the others reach it."""
        self.name = f"engine_{number}"
        super().__init__(f"{self.name}_actor", surroundings)
        self._args = args
        self._host = host
        self._gpus: list[int] | None = None
        self._port = 0
        self._current: Incarnation | None = None
        self._generating = threading.Event()
        self._stopping = threading.Event()
        self._lost = threading.Event()

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
        self._current = Incarnation(self._launch(), 0)
        return self._current.server.url

    def wait_ready(self) -> EngineMember:
        """Return once the server answers, also one that has just been started anew.

        Raises:
            RuntimeError: it died or took too long; the message ends with its log.
        """
        from slime.weight_sync.base import EngineMember

        while True:
            current = self._incarnation()
            if current.released and current.server.alive:
                break  # it answers nobody, and is there
            try:
                current.server.wait_ready(self._args.engine_start_timeout)
            except RuntimeError:
                first_start = not (current.ready or current.number)
                if first_start or current.server.alive or self._lost.is_set():
                    raise
                time.sleep(WATCH_SECONDS)  # `watch` starts the next one, or gives up
                continue
            current.ready = True
            break
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
        checked, failed = time.monotonic(), 0
        while not self._stopping.wait(WATCH_SECONDS):
            current = self._incarnation()
            if current.released:
                continue  # a new server would take the memory that others have now
            if not self._generating.is_set() or not current.ready:
                checked, failed = time.monotonic(), 0
            elif time.monotonic() - checked > self._args.rollout_health_check_interval:
                failed = 0 if self._healthy(current.server) else failed + 1
                checked = time.monotonic()
            if failed == FAILED_CHECKS or not current.server.alive:
                self._restart(current, hangs=failed == FAILED_CHECKS)
                checked, failed = time.monotonic(), 0

    @ray.method(concurrency_group="control")
    def set_generating(self, generating: bool) -> None:
        """Say whether requests may come: only then the server's health is checked.

        Raises:
            RuntimeError: memory that it needs to generate is released.
        """
        released = self._incarnation().released
        if generating and released:
            raise RuntimeError(
                f"{self.name} is to generate, and its {', '.join(sorted(released))} are released."
            )
        if generating:
            self._generating.set()
        else:
            self._generating.clear()

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the idle server give memory back."""

        async def release(control: EngineControl) -> None:
            await control.flush_cache()
            await control.release_memory(tags)

        self._control(release)
        self._incarnation().released.update(tags)

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the server take memory again. One that has died meanwhile is started anew, with all of it."""
        current = self._incarnation()
        if not current.server.alive:
            self._restart(current, hangs=False)
            self.wait_ready()
            return
        asked: list[MemoryTag] = [
            tag for tag in tags if tag in current.released
        ]  # a new server has released nothing
        if asked:
            self._control(lambda control: control.resume_memory(asked))
            current.released.difference_update(asked)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End the server with all that it started."""
        self._stopping.set()
        if self._current is not None:
            self._current.server.stop()

    def _launch(self) -> ServerProcess:
        from slime.engines.process import start_server

        args = self._args
        extra = args.sglang_command_line()
        if args.colocate and args.engine == "sglang":
            extra = ["--enable-memory-saver", *extra]
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
            extra_args=extra,
            role="student",
        )

    def _restart(self, last: Incarnation, *, hangs: bool) -> None:
        limit = self._args.engine_restarts
        how = "hangs" if hangs else f"ended with exit status {last.server.returncode}"
        if self._stopping.is_set():
            return
        if last.number >= limit or not (last.ready or last.number):
            self._lost.set()
            raise RuntimeError(
                f"the student's engine at {last.server.url} {how}"
                + (f" after {last.number} restarts (--engine-restarts {limit})" if last.number else "")
                + f". The end of its log, {last.server.log_path}:\n{last.server.log_tail()}"
            )
        last.server.stop()
        sys.stdout.write(
            f"{self.name} at {last.server.url} {how} in the middle of the run; restart {last.number + 1} of "
            f"{limit}. The end of its log, {last.server.log_path}:\n{last.server.log_tail(5)}\n"
        )
        sys.stdout.flush()
        self._current = Incarnation(self._launch(), last.number + 1)

    def _healthy(self, server: ServerProcess) -> bool:
        from slime.engines.process import is_ready

        return is_ready(server.url, self._args.rollout_health_check_timeout, path="/health")

    def _control(self, verb: Callable[[EngineControl], Awaitable[None]]) -> None:
        from slime.engines.control import EngineControl

        async def say() -> None:
            async with EngineControl([self._incarnation().server.url], role=self.name) as control:
                await verb(control)

        asyncio.run(say())

    def _incarnation(self) -> Incarnation:
        if self._current is None:
            raise RuntimeError(f"{self.name} has no server yet; call start() first")
        return self._current
