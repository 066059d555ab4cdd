"""One client in a process of its own, so that no other's CPU is counted with its own.

Reads orders, one JSON line each, and answers each with a line. `python -m scripts.benchmarks.scoring.worker`
is started by the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
import torch

from scripts.benchmarks.scoring.measuring import measured, resident_bytes, tick
from scripts.benchmarks.scoring.ours import OurClient
from scripts.benchmarks.scoring.plain import PlainClient
from scripts.benchmarks.scoring.workload import Group, Shape, Vocabulary, make_groups

T = TypeVar("T")


class TeacherClient(Protocol[T]):
    """A way to ask a teacher; T is what it keeps of a sample until all are scored."""

    async def ask(self, groups: list[Group]) -> list[T]: ...
    def finish(self, asked: list[T]) -> list[torch.Tensor]: ...
    def entries(self, asked: list[T]) -> list[int]: ...
    async def close(self) -> None: ...


async def turn(client: TeacherClient[T], order: dict[str, Any], resident: int) -> dict[str, Any]:
    """Score one workload; return what it cost and what came back."""
    groups = make_groups(Shape(**order["shape"]), Vocabulary(**order["vocabulary"]), order["turn"])
    with measured(resident) as cost:
        ticker = asyncio.create_task(tick(cost))
        await asyncio.sleep(0)  # the first tick is set before the work begins
        asked = await client.ask(groups)
        ticker.cancel()
        tensors = client.finish(asked)
    assert [len(tensor) for tensor in tensors] == [order["shape"]["response"]] * len(tensors)
    sums = [float(tensor.double().sum()) for tensor in tensors]
    return asdict(cost) | {"entries": client.entries(asked), "sums": sums}


async def work(client: TeacherClient[T]) -> None:
    """Take orders until the input ends."""
    loop, resident = asyncio.get_running_loop(), resident_bytes()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer = await turn(client, orjson.loads(line), resident)
        sys.stdout.write(orjson.dumps(answer).decode() + "\n")
        sys.stdout.flush()
    await client.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="One client of the teacher-scoring benchmark.")
    parser.add_argument("client", choices=("plain", "ours"))
    parser.add_argument("--url", required=True, help="the server, without a path")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with the models' config.json")
    options = parser.parse_args()
    if options.client == "plain":
        asyncio.run(work(PlainClient(options.url)))
    else:
        asyncio.run(work(OurClient(options.url, options.checkpoint)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
