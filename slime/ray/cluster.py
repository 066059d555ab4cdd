"""Ray for the length of a run: started or joined, watched, and ended on every path.

A dead actor or engine ends whatever the driver waits for, within a second or two and with the end of its log.
What the actors do is the groups' business, in which order `slime/train.py`'s.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.engines.errors import EnginesLostError
from slime.engines.sglang_engine import LOOPBACK_HOSTS
from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from slime.metrics.trace import Span
from slime.ray.actor import Actor, Surroundings, log_path, terminal_name
from slime.ray.interrupts import listen, shielded
from slime.ray.resources import Resources, plan_resources
from slime.scratch import ScratchFolder

if TYPE_CHECKING:
    from slime.arguments import Args

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PROCESSORS = 2
"""What Ray counts: our actors ask for none, and it starts so many idle workers at once."""
MAX_SOCKET_FOLDER_LENGTH = 40
"""Ray puts Unix sockets some 65 characters below its folder, and their paths may have 107."""
RAY_PREFIX = "slime-ray-"
POLL_SECONDS = 0.5
STOP_SECONDS = 30.0
LOG_TAIL_LINES = 30
ANSI_COLOURS = re.compile(r"\x1b\[\d*m")
PASSED_ON = (ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, "OMP_WAIT_POLICY")
RAY_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # It would kill our workers for memory that others on the machine use.
    "RAY_memory_monitor_refresh_ms": "0",
    # By default workers, and the engines that they start, yield to everything else on the machine.
    "RAY_worker_niceness": "0",
}


class ActorError(RuntimeError):
    """A call of an actor failed, or the actor died; the message ends with what it said."""


class EnginesLost(ActorError):  # noqa: N818 (what happened, not a fault of anybody)
    """A call needed the student's engines, and none of them has the current weights any more."""


class Cluster:
    """A Ray cluster of our own, or a connection to one that is there, and our actors in it."""

    def __init__(self, args: Args) -> None:
        self._args = args
        self._folder: ScratchFolder | None = None
        self._actors: dict[str, Any] = {}
        self._alarms: dict[ray.ObjectRef, str] = {}
        self._expected: list[ray.ObjectRef] = []
        self._to_stop: list[Any] = []
        self._environment = _environment(invents_key=not args.rollout_engine_urls)

    def __enter__(self) -> Self:
        try:
            self._start_ray()
            if not (self.one_machine or self._args.rollout_engine_urls):
                # Engines then listen where other machines reach them. All who ask them are actors of ours.
                self._environment.setdefault(API_KEY_VARIABLE, secrets.token_hex(16))
            self._surroundings = Surroundings(
                output_dir=str(Path(self._args.output_dir).resolve()),
                log_level=self._args.log_level,
                environment=self._environment,
                terminal=terminal_name() if self._args.ray_address is None else None,
            )
            self.resources: Resources = plan_resources(self._args, int(ray.cluster_resources().get("GPU", 0)))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def one_machine(self) -> bool:
        """Whether all processes, engines of others included, share this machine's files and memory."""
        local = all(urlsplit(url).hostname in LOOPBACK_HOSTS for url in self._args.rollout_engine_urls)
        return local and sum(node["Alive"] for node in ray.nodes()) == 1

    def start_actor(
        self,
        name: str,
        actor_class: type[Actor],
        *arguments: Any,
        num_gpus: float = 0,
        scheduling: PlacementGroupSchedulingStrategy | None = None,
    ) -> Any:
        """Start an actor and return its handle; its last argument are the surroundings.

        Actors ask for no CPU: they take turns, and on a small machine they must all be there nevertheless.
        """
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": num_gpus,
            "max_restarts": 0,
            "concurrency_groups": {"control": 2},
        }
        if scheduling is not None:
            options["scheduling_strategy"] = scheduling
        remote: Any = ray.remote(**options)
        handle = remote(actor_class).remote(*arguments, self._surroundings)
        self._actors[name] = handle
        return handle

    def watch(self, name: str) -> None:
        """Let the death of the actor, or of the server that it owns, end every `wait`."""
        self._alarms[self._actors[name].watch.remote()] = name

    def expect(self, ref: ray.ObjectRef) -> None:
        """Let the failure of a call that nobody waits for yet end every `wait`."""
        self._expected.append(ref)

    def take_spans(self) -> dict[str, list[Span]]:
        """Return what each actor has measured since the last call."""
        calls = {name: actor.take_spans.remote() for name, actor in self._actors.items()}
        return dict(zip(calls, self.wait(list(calls.values())), strict=True))

    def stop_at_end(self, handle: Any) -> None:
        """Call `handle.stop` before the actor is killed."""
        self._to_stop.append(handle)

    def end(self, names: Sequence[str]) -> None:
        """End some of the actors, in the middle of what they do; nobody misses them from now on."""
        handles = [self._actors.pop(name) for name in names]
        self._alarms = {ref: name for ref, name in self._alarms.items() if name not in names}
        self._expected.clear()
        self._end([handle for handle in self._to_stop if handle in handles], handles)
        self._to_stop = [handle for handle in self._to_stop if handle not in handles]

    def wait(self, refs: Sequence[ray.ObjectRef]) -> list[Any]:
        """Return the results of all `refs`; raise the first error of any of them, of an expected call, or of
        a watched actor, at once.

        Raises:
            ActorError: a call failed, or an actor died; the message ends with what it said.
        """
        owners = dict(self._alarms)
        pending = list(refs)
        while pending:
            expected = [ref for ref in self._expected if ref not in refs]
            done, _ = ray.wait([*pending, *expected, *owners], num_returns=1, timeout=POLL_SECONDS)
            for ref in done:
                if self._spares(ref, refs):
                    continue
                self._result(ref)
                if ref in owners:
                    raise ActorError(f"{owners[ref]} stopped while it was needed")
            pending = [ref for ref in pending if ref not in done]
            self._expected = [ref for ref in self._expected if ref not in done]
        return [self._result(ref) for ref in refs]

    def stop(self) -> None:
        """End every actor, every server and Ray itself. A second call does nothing."""
        with shielded():
            if ray.is_initialized():
                self._end(self._to_stop, self._actors.values())
                ray.shutdown()
            self._actors.clear()
            self._alarms.clear()
            self._expected.clear()
            self._to_stop.clear()
            if self._folder is not None:
                self._folder.close()

    @staticmethod
    def _end(to_stop: Iterable[Any], to_kill: Iterable[Any]) -> None:
        stopping = [handle.stop.remote() for handle in to_stop]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=STOP_SECONDS)
        for handle in to_kill:
            ray.kill(handle)

    def _start_ray(self) -> None:
        os.environ.update({name: value for name, value in RAY_VARIABLES.items() if name not in os.environ})
        paths = [str(PROJECT_ROOT), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
        if self._args.ray_address is not None:
            # Its workers do not inherit our environment.
            runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
            ray.init(address=self._args.ray_address, runtime_env=runtime_env, **options)
        else:
            os.environ["PYTHONPATH"] = os.pathsep.join(paths)
            self._folder = ScratchFolder(_socket_parent(), RAY_PREFIX)
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=PROCESSORS,
                # Ray opens its folder to everybody; ours around it stays closed.
                _temp_dir=str(self._folder.path / "r"),
                **options,
            )
        listen()

    def _spares(self, ref: ray.ObjectRef, waited_for: Sequence[ray.ObjectRef]) -> bool:
        """Tell whether a call that somebody will wait for later failed in a way that only they can mend."""
        if ref in waited_for or ref not in self._expected:
            return False
        try:
            self._result(ref)
        except EnginesLost:
            return True
        return False

    def _result(self, ref: ray.ObjectRef) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error, EnginesLostError):
                raise EnginesLost(str(error.cause)) from None
            # Its text is the traceback in the actor; the driver's own, inside Ray, would only bury it.
            raise ActorError(ANSI_COLOURS.sub("", str(error))) from None
        except RayActorError as error:
            raise ActorError(self._obituary(error)) from None

    def _obituary(self, error: RayActorError) -> str:
        """Say which actor died, and what it wrote last."""
        for name, handle in self._actors.items():
            if handle._actor_id.hex() == error.actor_id:
                path = log_path(self._args.output_dir, name)
                text = path.read_text(errors="replace") if path.exists() else ""
                tail = "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "(empty)"
                return f"{name} died: {error}\nThe end of its log, {path}:\n{tail}"
        return str(error)


def _environment(*, invents_key: bool) -> dict[str, str]:
    """Return the variables that every actor sets: the keys of the engines, and OpenMP's manners.

    Engines that run elsewhere have keys of their own; for those of this run one is invented.
    """
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if invents_key:
        variables.setdefault(ADMIN_KEY_VARIABLE, secrets.token_hex(16))
    # Threads that wait by spinning take the cores of the processes that they wait for: ten times slower when
    # trainer, engine and teacher share two cores.
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return variables


def _socket_parent() -> Path:
    """Return the temporary folder, or /tmp where its path is too long for Ray's sockets."""
    parent = tempfile.gettempdir()
    return Path(parent if len(parent) <= MAX_SOCKET_FOLDER_LENGTH else "/tmp")
