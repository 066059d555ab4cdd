"""The transformers engine beside the trainer on one device: what it samples, and turns at the memory.

The turn is that of `--colocate`: pause, release, train, resume, update, flush, continue.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from scripts.benchmarks.training.published import checkpoint_bytes
from scripts.checks.gpu.batch import ScoredBatch, job_args, log_probs_of, masked_ids, prompts_of
from scripts.checks.gpu.result import Row, at_least, failed, skipped, within
from scripts.checks.gpu.room import GIB, lacking, random_checkpoint
from scripts.checks.gpu.setting import Setting, backend_on, gpu_id
from slime.arguments import Args
from slime.engines.client import EngineClient
from slime.engines.model_facts import model_facts
from slime.engines.process import ServerProcess, free_port, transformers_command
from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE
from slime.rollout.generate import Sampler, generate_all
from slime.rollout.rollout import rollout_params
from slime.tiny.paths import checkpoint_path, ensure_dataset
from slime.trainer import Trainer, build_shards
from slime.utils.processing_utils import load_processor
from slime.utils.types import Sample
from slime.weight_sync.disk import write_weights

CHECK = "engine"
MOVED = ("kv_cache", "weights")
READY_SECONDS = 150.0
FREED_SHARE = 0.8
"""Of the weights' bytes: what a release must give back at least."""


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
    """What the engine must give back; 0: too little to see among what else moves."""


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
    port, key = free_port(), secrets.token_hex(16)
    command, env = transformers_command(
        str(case.checkpoint),
        port,
        gpus=[0] if setting.on_gpu else None,
        tp=1,
        dtype=case.dtype,
        threads=1,
        extra_args=(),
        env=dict(os.environ) | {ADMIN_KEY_VARIABLE: key},
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
    """Sample, compare; release, train, resume; update, sample, compare."""
    data = ensure_dataset(setting.scratch / "data")["test"]
    args = job_args(case.checkpoint, data, "--train-dtype", case.dtype, "--lr", f"{case.lr:g}")
    masked = masked_ids(case.checkpoint)
    with (
        serving(setting, case) as server,
        backend_on(setting.device, args, masked) as backend,
    ):
        first = _sample(server, args, masked, seed="before")
        before = log_probs_of(backend, case.checkpoint, first)
        yield from _agreement(case, "engine against trainer", first, before)
        release, released = _release(setting, case, server)
        yield from release
        Trainer(args, backend, load_processor(case.checkpoint), masked).train(0, _shard(args, first))
        folder = setting.scratch / f"update-{case.dtype}"
        write_weights(backend.hf_named_parameters(), folder, checkpoint=case.checkpoint, writes=True)
        after = log_probs_of(backend, case.checkpoint, first)
        change = torch.cat(after).sub(torch.cat(before)).abs().mean().item()
        what = f"{case.name}: the step moved log-probs, mean in nats"
        yield at_least(CHECK, what, change, 2 * case.mean)
        if released:
            yield from _resume(setting, case, server)
        asyncio.run(_update(server, folder))
        second = _sample(server, args, masked, seed="after")
        versions = {version for sample in second.samples for version in sample.weight_versions}
        if versions != {"1"}:
            yield failed(CHECK, f"{case.name}: version after the update", f"{sorted(versions)}, not 1")
        again = log_probs_of(backend, case.checkpoint, second)
        yield from _agreement(case, "again after the update", second, again)


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
    return EngineClient([server.url], role="student engine", admin_key=server.admin_key, timeout=120.0)


async def _update(server: ServerProcess, folder: Path) -> None:
    async with _client(server) as client:
        await client.update_weights_from_disk(str(folder), "1")
        await client.flush_cache()
        await client.continue_()


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


def _release(setting: Setting, case: Case, server: ServerProcess) -> tuple[list[Row], bool]:
    """Pause and release; return what was seen, and whether there is something to resume."""
    what = f"{case.name}: GiB given back by the release"

    async def pause() -> None:
        async with _client(server) as client:
            await client.pause("retract")
            await client.flush_cache()

    asyncio.run(pause())
    free = _free_bytes(setting)
    status, answer = _post(server, "/release_memory_occupation", {"tags": list(MOVED)})
    if status != http.HTTPStatus.OK:
        return [skipped(CHECK, what, f"the engine answered {status}: {answer[:200]}")], False
    return _memory_rows(setting, case, what, _free_bytes(setting) - free), True


def _resume(setting: Setting, case: Case, server: ServerProcess) -> list[Row]:
    """Resume what was released, and see the memory taken again."""
    what = f"{case.name}: GiB taken again by the resume"
    free = _free_bytes(setting)
    status, answer = _post(server, "/resume_memory_occupation", {"tags": list(MOVED)})
    if status != http.HTTPStatus.OK:
        return [failed(CHECK, what, f"the engine answered {status}: {answer[:200]}")]
    return _memory_rows(setting, case, what, free - _free_bytes(setting))


def _memory_rows(setting: Setting, case: Case, what: str, moved: int) -> list[Row]:
    if case.weight_bytes == 0:
        return []
    if not setting.on_gpu:
        return [skipped(CHECK, what, "the device has no memory of its own")]
    return [at_least(CHECK, what, moved / GIB, FREED_SHARE * case.weight_bytes / GIB, "{:.1f}")]


def _free_bytes(setting: Setting) -> int:
    """Return the device's free memory, less what this process keeps without need."""
    if not setting.on_gpu:
        return 0
    torch.cuda.synchronize(setting.device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(setting.device)[0]


def _post(server: ServerProcess, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Post to a control endpoint that the client has no verb for; return status and body."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.admin_key}"}
    try:
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()
