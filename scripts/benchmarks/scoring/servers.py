"""The two servers that are asked, and what each says about the work that it was given."""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from scripts.benchmarks.scoring.model import save_config, save_model
from scripts.benchmarks.scoring.workload import Vocabulary
from slime.engines.process import PROJECT_ROOT, ServerProcess, free_port, start_server

Counts = dict[str, int]
STUB_SECONDS = 60
SGLANG_SECONDS = 600


class Server(ABC):
    """A running server and the checkpoint, or the config of one, that it stands for."""

    def __init__(self, process: ServerProcess, checkpoint: Path, vocabulary: Vocabulary) -> None:
        self.url = process.url
        self.checkpoint = checkpoint
        self.vocabulary = vocabulary
        self._key = process.admin_key
        self._pid = process.pid

    def flush(self) -> None:
        """Empty the prefix cache, so that each turn begins cold."""
        self._ask("POST", "/flush_cache")

    @abstractmethod
    def counts(self) -> Counts:
        """Return counters of the work since the server began, or since the last flush."""

    def cpu_seconds(self) -> float:
        """Return the CPU time that the server's processes have used so far."""
        server = psutil.Process(self._pid)
        return sum(sum(one.cpu_times()[:2]) for one in [server, *server.children(recursive=True)])

    def _ask(self, method: str, path: str) -> str:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        data = b"" if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()


class StubServer(Server):
    """The stand-in, which counts by a model of a prefix cache."""

    def counts(self) -> Counts:
        return json.loads(self._ask("GET", "/counts"))


class SglangServer(Server):
    """The real server, which counts for Prometheus."""

    def counts(self) -> Counts:
        text = self._ask("GET", "/metrics")
        prompt = _counter(text, "sglang:prompt_tokens_total")
        cached = _counter(text, "sglang:cached_tokens_total")
        return {"prefilled_tokens": prompt - cached, "cached_tokens": cached}


def _counter(text: str, name: str) -> int:
    """Sum a counter over its labels."""
    return int(sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


@contextmanager
def stub_server(folder: Path) -> Iterator[Server]:
    """Run the stand-in until the block ends; checkpoint and log go to `folder`."""
    checkpoint = folder / "config"
    vocabulary = save_config(checkpoint)
    port = free_port()
    command = [sys.executable, "-m", "scripts.benchmarks.scoring.stub", "--port", str(port)]
    env = dict(os.environ) | {"PYTHONPATH": str(PROJECT_ROOT)}
    url = f"http://127.0.0.1:{port}"
    with ServerProcess.start(command, url=url, log_path=folder / "stub.log", env=env) as process:
        process.wait_ready(STUB_SECONDS)
        yield StubServer(process, checkpoint, vocabulary)


@contextmanager
def sglang_server(folder: Path, threads: int, embeddings_mb: int) -> Iterator[Server]:
    """Run SGLang on the CPU, as the launcher starts a teacher, until the block ends.

    `embeddings_mb` is its cache of vision embeddings: the launcher gives a teacher one, and SGLang's own
    default is 0 on GPUs of 60 GB and more.

    Raises:
        RuntimeError: its environment is not there (`bash scripts/setup.sh --sglang-cpu`).
    """
    checkpoint = folder / "model"
    vocabulary = save_model(checkpoint)
    process = start_server(
        "sglang",
        str(checkpoint),
        free_port(),
        folder / "sglang.log",
        role="teacher",
        threads=threads,
        extra_args=["--enable-metrics"],
        env={"SGLANG_VLM_CACHE_SIZE_MB": str(embeddings_mb)},
    )
    with process:
        process.wait_ready(SGLANG_SECONDS)
        yield SglangServer(process, checkpoint, vocabulary)
