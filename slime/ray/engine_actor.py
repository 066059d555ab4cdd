"""One of the student's engines: a server process on the GPUs that Ray gave this actor.

It starts the server, tells when it dies, and ends it. Requests go past it, from the rollout actor to the
server.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import ray

from slime.ray.actor import Actor, Surroundings, log_path

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.engines.process import ServerProcess

WATCH_SECONDS = 0.5


class EngineActor(Actor):
    """Owns one server."""

    def __init__(self, args: Args, number: int, surroundings: Surroundings) -> None:
        self.name = f"engine_{number}"
        super().__init__(f"{self.name}_actor", surroundings)
        self._args = args
        self._server: ServerProcess | None = None
        self._stopping = threading.Event()

    def start(self) -> str:
        """Start the server and return its URL at once; `wait_ready` waits for it.

        Raises:
            ValueError: a --sglang-* flag is none of the installed SGLang's.
        """
        from slime.engines.process import free_port, start_server
        from slime.engines.sglang_flags import check_sglang_flags

        args = self._args
        gpus = [int(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]
        extra_args = args.sglang_command_line() if args.engine == "sglang" else []
        check_sglang_flags(extra_args, gpus=gpus or None, env=os.environ)
        self._server = start_server(
            args.engine,
            args.hf_checkpoint,
            free_port(),
            log_path(args.output_dir, self.name),
            tp=args.rollout_num_gpus_per_engine if gpus else 1,
            gpus=gpus or None,
            dtype=args.engine_dtype or args.precision,
            threads=args.engine_threads,
            extra_args=extra_args,
            role="student",
        )
        return self._server.url

    def wait_ready(self) -> None:
        """Return once the server answers.

        Raises:
            RuntimeError: it died or took too long; the message ends with its log.
        """
        self._running().wait_ready(self._args.engine_start_timeout)

    @ray.method(concurrency_group="control")
    def watch(self) -> None:
        """Return after `stop`; raise once the server has ended by itself.

        Raises:
            RuntimeError: the server died; the message ends with its log.
        """
        server = self._running()
        while not self._stopping.wait(WATCH_SECONDS):
            if not server.alive:
                raise RuntimeError(
                    f"the student's engine at {server.url} ended with exit status {server.returncode}. The "
                    f"end of its log, {server.log_path}:\n{server.log_tail()}"
                )

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """End the server with all that it started."""
        self._stopping.set()
        if self._server is not None:
            self._server.stop()

    def _running(self) -> ServerProcess:
        if self._server is None:
            raise RuntimeError(f"{self.name} has no server yet; call start() first")
        return self._server
