"""Ray started, watched and ended: with small actors on a real Ray."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from slime.ray.actor import Actor, Surroundings
from slime.ray.cluster import ActorError, Cluster
from slime.ray.interrupts import held, ignore, listen, shielded


@dataclass(frozen=True)
class _Args:
    output_dir: str
    log_level: str = "info"
    ray_address: str | None = None
    actor_num_nodes: int = 1
    num_train_ranks: int = 1
    rollout_num_gpus: int | None = None
    rollout_num_gpus_per_engine: int = 1
    rollout_engine_urls: tuple[str, ...] = ()
    replays: bool = False
    engine: str = "transformers"
    colocate: bool = False
    weight_sync: str = "disk"


class _Worker(Actor):
    """Does what the tests ask of an actor."""

    def __init__(self, name: str, surroundings: Surroundings) -> None:
        super().__init__(name, surroundings)

    def pid(self) -> int:
        return os.getpid()

    def key(self) -> str:
        return os.environ["SLIME_ENGINE_ADMIN_KEY"]

    def fail(self) -> None:
        raise ValueError("the answer is no number")

    def die(self) -> None:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def measure(self, rollout_id: int) -> None:
        with self.stopwatch.stage("work", rollout_id=rollout_id):
            pass

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Give the signals back to pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    others = set(psutil.Process().children(recursive=True))
    with Cluster(cast(Any, _Args(str(tmp_path_factory.mktemp("run"))))) as running:
        folder = running._folder
        children = [child for child in psutil.Process().children(recursive=True) if child not in others]
        yield running
    assert folder is not None
    assert not folder.path.exists()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    for number, handler in before.items():
        signal.signal(number, handler)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


def _start(cluster: Cluster, name: str):
    return cluster.start_actor(name, _Worker, name)


def test_results_come_in_the_order_of_their_calls(cluster):
    workers = [_start(cluster, f"a{number}") for number in range(2)]
    first, second = cluster.wait([worker.pid.remote() for worker in workers])
    assert first != second
    keys = cluster.wait([worker.key.remote() for worker in workers])
    assert keys[0] == keys[1]
    command_lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not any(keys[0] in command_line for command_line in command_lines)


def test_an_error_arrives_with_its_traceback_while_others_still_work(cluster):
    slow, failing = _start(cluster, "slow"), _start(cluster, "failing")
    working = slow.sleep.remote(600)
    with pytest.raises(ActorError, match="the answer is no number") as caught:
        cluster.wait([working, failing.fail.remote()])
    assert ray.wait([working], timeout=0)[0] == []
    assert "in fail" in str(caught.value)


def test_a_watched_actors_death_ends_the_wait_for_another(cluster):
    slow, dying = _start(cluster, "patient"), _start(cluster, "dying")
    cluster.watch("dying")
    cluster.wait([dying.pid.remote()])
    dying.die.remote()
    with pytest.raises(ActorError, match=r"(?s)dying died.*last words"):
        cluster.wait([slow.sleep.remote(600)])
    cluster._alarms.clear()


def test_a_call_that_nobody_waits_for_yet_ends_the_wait_for_another_by_its_failure(cluster):
    slow, failing = _start(cluster, "busy"), _start(cluster, "ordered")
    done, failed = failing.pid.remote(), failing.fail.remote()
    cluster.expect(done)
    cluster.expect(failed)
    with pytest.raises(ActorError, match="the answer is no number"):
        cluster.wait([slow.sleep.remote(600)])
    cluster._expected.clear()
    assert isinstance(cluster.wait([done])[0], int)


def test_spans_are_taken_while_the_actor_works_on(cluster, monkeypatch):
    worker = _start(cluster, "measured")
    monkeypatch.setattr(cluster, "_actors", {"measured": worker})  # another test's is dead
    cluster.wait([worker.measure.remote(5)])
    busy = worker.sleep.remote(600)
    (span,) = cluster.take_spans()["measured"]
    assert (span.stage, span.facts) == ("work", {"rollout_id": 5})
    assert cluster.take_spans()["measured"] == []
    assert ray.wait([busy], timeout=0)[0] == []


def test_nobody_misses_an_actor_that_was_ended(cluster):
    """Neither the end of its watch nor that of a call of it that was expected ends the wait for another."""
    doomed, other = _start(cluster, "doomed"), _start(cluster, "left")
    cluster.watch("doomed")
    busy = doomed.sleep.remote(120)
    cluster.expect(busy)
    (pid,) = cluster.wait([doomed.pid.options(concurrency_group="control").remote()])
    cluster.end(["doomed"])
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
    assert not psutil.pid_exists(pid)
    with pytest.raises(RayActorError):
        ray.get(busy)
    assert isinstance(cluster.wait([other.pid.remote()])[0], int)


def test_rays_open_ports_ask_for_a_token(cluster):
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("given", [None, "chosen"])
def test_engines_that_other_machines_reach_get_a_key(monkeypatch, tmp_path, given):
    """On one machine they listen on loopback, where upstream's plugins send no key."""
    monkeypatch.setattr(Cluster, "_start_ray", lambda self: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    for machines in (1, 2):
        nodes = [{"Alive": True}] * machines
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        monkeypatch.delenv("SLIME_ENGINE_API_KEY", raising=False)
        if given:
            monkeypatch.setenv("SLIME_ENGINE_API_KEY", given)
        with monkeypatch.context() as patched:
            patched.setattr(Cluster, "stop", lambda self: None)
            with Cluster(cast(Any, _Args(str(tmp_path)))) as many:
                key = many._surroundings.environment.get("SLIME_ENGINE_API_KEY")
        if given or machines == 1:
            assert key == given
        else:
            assert key is not None
            assert len(key) == 32


def test_one_machine_is_seen_as_one(cluster):
    assert cluster.one_machine
    assert cluster.resources.num_ranks == 1


def test_signals_raise_while_the_run_works_and_not_while_it_ends():
    listen()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with shielded():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    ignore()
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_waits_for_what_must_not_be_cut_short():
    done = []

    def work() -> None:
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("whole")

    listen()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["whole"]
    with held():
        done.append("no signal")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_error_goes_before_a_signal_that_waits():
    def fail() -> None:
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError("the real fault")

    listen()
    with pytest.raises(ValueError, match="the real fault"):
        fail()


def test_a_long_temporary_folder_is_too_long_for_rays_sockets(monkeypatch, tmp_path):
    from slime.ray import cluster as module

    long = tmp_path / ("x" * 50)
    long.mkdir()
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(long))
    assert module._socket_parent() == Path("/tmp")
