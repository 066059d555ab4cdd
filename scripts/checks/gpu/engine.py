"""The transformers engine beside the trainer on one device: what it samples, and turns at the memory.

The turn is the one that a run with `--colocate` takes, by the same `Turns` and the same weight sync.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks.training.published import checkpoint_bytes
from scripts.checks.gpu.batch import (
    ScoredBatch,
    job_args,
    log_probs_of,
    masked_ids,
    prompts_of,
    write_prompts,
)
from scripts.checks.gpu.result import Row, at_least, failed, skipped, within
from scripts.checks.gpu.room import GIB, lacking, random_checkpoint
from scripts.checks.gpu.setting import Setting, backend_on, gpu_id
from slime.arguments import Args
from slime.backends.fsdp.backend import FsdpBackend
from slime.engines.client import EngineClient
from slime.engines.control import EngineControl, MemoryTag
from slime.engines.errors import EngineError
from slime.engines.model_facts import model_facts
from slime.engines.process import ServerProcess, free_port, transformers_command
from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE
from slime.ray.turns import Turns
from slime.rollout.generate import Sampler, generate_all
from slime.rollout.rollout import rollout_params
from slime.tiny.paths import checkpoint_path
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample
from slime.weight_sync.base import EngineMember
from slime.weight_sync.sync import WeightSync
from slime.weight_sync.tensor import TensorSender

CHECK = "engine"
READY_SECONDS = 150.0
MOVED_SHARE = 0.8
"""Of the bytes of weights, or of the optimizer's state: what must leave the device at least, or come back."""
BUCKET_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and the precision in which both sides compute."""

    name: str
    checkpoint: Path
    dtype: str
    mean: float
    """Largest mean distance allowed of a token's log-prob under engine and trainer, in nats."""
    largest: float
    lr: float
    """Of the one step, which must move log-probs by more than both sides are apart."""
    weight_bytes: int = 0
    """Of the engine, two a weight; 0: too little to see among what else moves."""


def run(setting: Setting) -> Iterator[Row]:
    """Let the tiny student in float32, and random weights in bfloat16, go through a colocated turn."""
    student = Case(
        name="tiny student, float32",
        checkpoint=checkpoint_path("student"),
        dtype="float32",
        mean=1e-3,
        largest=1e-3,
        lr=1e-3,
    )
    yield from _turn(setting, student)
    size = "tiny" if setting.tiny else "2B"
    refusal = lacking(setting, size, copies=2, served=True)
    if refusal:
        yield skipped(CHECK, f"random {size}, bfloat16", refusal)
        return
    random = Case(
        name=f"random {size}, bfloat16",
        checkpoint=random_checkpoint(setting, size),
        dtype="bfloat16",
        mean=0.03,
        largest=0.2,
        lr=1e-3 if setting.tiny else 1e-4,
        weight_bytes=checkpoint_bytes(size),
    )
    yield from _turn(setting, random)


@contextmanager
def serving(setting: Setting, case: Case) -> Iterator[ServerProcess]:
    """Run the engine on the device until the block ends."""
    port = free_port()
    key = os.environ.setdefault(ADMIN_KEY_VARIABLE, secrets.token_hex(16))  # the weight sync reads it there
    command, env = transformers_command(
        str(case.checkpoint),
        port,
        gpus=[0] if setting.on_gpu else None,
        tp=1,
        dtype=case.dtype,
        threads=1,
        extra_args=(),
        env=os.environ,
    )
    if setting.on_gpu:
        env["CUDA_VISIBLE_DEVICES"] = gpu_id()
    log = setting.scratch / f"engine-{case.dtype}.log"
    with ServerProcess.start(
        command, url=f"http://127.0.0.1:{port}", log_path=log, env=env, admin_key=key
    ) as server:
        server.wait_ready(READY_SECONDS)
        yield server


def _turn(setting: Setting, case: Case) -> Iterator[Row]:
    """Sample and compare; train, sync; sample and compare again."""
    data = write_prompts(setting.scratch)
    args = job_args(case.checkpoint, data, "--train-dtype", case.dtype, "--lr", f"{case.lr:g}")
    masked = masked_ids(case.checkpoint)
    with serving(setting, case) as server, backend_on(setting.device, args, masked) as backend:
        first = _sample(server, args, masked, seed="before")
        before = log_probs_of(backend, case.checkpoint, first)
        yield from _agreement(case, "engine against trainer", first, before)
        engines, trainers = Engines(setting, server), Trainers(setting, backend)
        trainers.offload()
        turns = Turns(engines, trainers)
        try:
            turns.to_training()
        except EngineError as error:
            yield skipped(CHECK, f"{case.name}: a turn of colocation", str(error))
            return
        Trainer(args, backend, load_processor(case.checkpoint), masked).train(0, _shard(args, first))
        turns.to_sync()
        sender = TensorSender(leads=True, device=setting.device, bucket_bytes=BUCKET_BYTES)
        sync = WeightSync(sender, case.checkpoint, leads=True, timeout=120)
        sync.publish(backend.hf_named_parameters(), [EngineMember(url=server.url)], "1")
        after = log_probs_of(backend, case.checkpoint, first)
        change = torch.cat(after).sub(torch.cat(before)).abs().mean().item()
        what = f"{case.name}: the step moved log-probs, mean in nats"
        yield at_least(CHECK, what, change, 2 * case.mean)
        turns.to_generation()
        second = _sample(server, args, masked, seed="after")
        versions = {version for sample in second.samples for version in sample.weight_versions}
        if versions != {"1"}:
            yield failed(CHECK, f"{case.name}: version after the sync", f"{sorted(versions)}, not 1")
        trainers.onload()
        again = log_probs_of(backend, case.checkpoint, second)
        yield from _agreement(case, "again after a turn of colocation", second, again)
    yield from _memory_rows(setting, case, engines.moved | trainers.moved)


@dataclass
class Engines:
    """The engine's memory verbs, as `Turns` calls them; `moved` says what each gave back first, in bytes."""

    setting: Setting
    server: ServerProcess
    moved: dict[str, int] = field(default_factory=dict)

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the engine give memory back."""
        note_moved(self, "engine's release", lambda: self._say("release_memory", tags))

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Let the engine take memory again."""
        note_moved(self, f"engine's resume of {' and '.join(tags)}", lambda: self._say("resume_memory", tags))

    def _say(self, verb: str, tags: Sequence[MemoryTag]) -> None:
        async def say() -> None:
            async with EngineControl([self.server.url], timeout=120.0) as control:
                await (control.release_memory if verb == "release_memory" else control.resume_memory)(tags)

        asyncio.run(say())


@dataclass
class Trainers:
    """The backend's memory verbs, likewise."""

    setting: Setting
    backend: FsdpBackend
    moved: dict[str, int] = field(default_factory=dict)

    def onload(self) -> None:
        """Bring all that was put away back."""
        note_moved(self, "trainer's model back", self.backend.onload)

    def offload_optimizer(self) -> None:
        """Put the optimizer's state into the host's memory."""
        note_moved(self, "trainer's optimizer put away", self.backend.offload_optimizer)

    def offload(self) -> None:
        """Put model and optimizer into the host's memory."""
        note_moved(self, "trainer's model put away", self.backend.offload)


def note_moved(side: Engines | Trainers, name: str, verb: Callable[[], None]) -> None:
    """Call a verb and note by how much the device's free memory grew, the first time."""
    before = _free_bytes(side.setting)
    verb()
    side.moved.setdefault(name, _free_bytes(side.setting) - before)


def _sample(server: ServerProcess, args: Args, masked: tuple[int, ...], *, seed: str) -> ScoredBatch:
    """Let the engine answer the job's prompts."""
    batch = prompts_of(args)
    facts = model_facts(args.hf_checkpoint)

    async def ignore(_: Sample) -> None:
        return

    async def ask() -> list[Sample]:
        async with _client(server) as client:
            return await generate_all(
                args,
                batch.samples,
                rollout_params(args, masked),
                Sampler(client, facts),
                label=seed,
                seed_label=seed,
                after=ignore,
            )

    return ScoredBatch(asyncio.run(ask()), batch.pictures)


def _client(server: ServerProcess) -> EngineClient:
    return EngineClient([server.url], role="student engine", timeout=120.0)


def _agreement(case: Case, what: str, batch: ScoredBatch, trainers: list[torch.Tensor]) -> list[Row]:
    """Compare the log-probs of what was sampled, token by token."""
    engines = torch.tensor([value for sample in batch.samples for value in sample.rollout_log_probs or ()])
    gaps = (engines - torch.cat(trainers)).abs()
    tokens = f"{len(gaps)} tokens in nats"
    return [
        within(CHECK, f"{case.name}: {what}, mean gap of {tokens}", gaps.mean().item(), case.mean),
        within(CHECK, f"{case.name}: {what}, largest gap of {tokens}", gaps.max().item(), case.largest),
    ]


def _shard(args: Args, batch: ScoredBatch) -> Any:
    """Return what to train on: as if the teacher liked every second sample and not the others."""
    for number, sample in enumerate(batch.samples):
        shift = 1.0 if number % 2 else -1.0
        sample.teacher_log_probs = torch.tensor(sample.rollout_log_probs) + shift
        sample.metadata |= {"task_reward": float(number % 2), "train_reward": 0.0, "raw_reward": 0.0}
    [shard] = build_shards(args, batch.samples, batch.pictures, 1, 0)
    return shard


def _memory_rows(setting: Setting, case: Case, moved: dict[str, int]) -> Iterator[Row]:
    """Hold what each verb moved against what it is about."""
    if case.weight_bytes == 0:
        return
    weights = case.weight_bytes
    expected = {
        "engine's release": weights,
        "engine's resume of weights": -weights,
        "trainer's model put away": 2 * weights,
        "trainer's model back": -2 * weights,
        "trainer's optimizer put away": 4 * weights,
    }
    for name, size in expected.items():
        way = "given back" if size > 0 else "taken"
        what = f"{case.name}: {name}, GiB {way}"
        if not setting.on_gpu:
            yield skipped(CHECK, what, "the device has no memory of its own")
            continue
        seen = moved[name] if size > 0 else -moved[name]
        yield at_least(CHECK, what, seen / GIB, MOVED_SHARE * abs(size) / GIB, "{:.1f}")


def _free_bytes(setting: Setting) -> int:
    """Return the device's free memory, less what this process keeps without need."""
    if not setting.on_gpu:
        return 0
    torch.cuda.synchronize(setting.device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(setting.device)[0]
