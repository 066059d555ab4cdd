"""Building and loading a model never holds a second copy: measured on one of 1 GB, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from slime.engines.process import free_port
from slime.tiny.model import build_config, save_processor
from slime.tiny.tokenizer import build_tokenizer
from tests.fakes.training import DISTILL, joined_backend, make_args

pytest.importorskip("megatron.core")

WORKER = "from tests.invariants.test_megatron_memory import work; work()"
ALLOWED = 1.3
BUCKET = 100 * 2**20
"""More than any block of a tensor that is copied at once (33 MB), and than what else a start allocates."""


class StoppedError(Exception):
    """The model is loaded; neither buffers of gradients nor an optimizer exist yet."""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    config = build_config(build_tokenizer())
    text: Any = config.get_text_config()
    vision: Any = config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 8192, 10
    vision.out_hidden_size = 1024
    Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder, max_shard_size="300MB")
    save_processor(folder)
    return folder


def anonymous_bytes() -> int:
    """Return this process's memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def work() -> None:
    """Be one rank: build and load, and print how much memory that took at most, and the weights of it."""
    from slime.backends.megatron import backend

    model, rank, ranks, port, *flags = sys.argv[1:]
    args = make_args(Path(model), *DISTILL, "--train-backend", "megatron", *flags, ranks=int(ranks))
    before, peak, stopped, share = anonymous_bytes(), 0, threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not stopped.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    def stop(_: object, policy: torch.nn.Module) -> None:
        nonlocal peak, share
        stopped.set()
        watcher.join()
        peak = max(peak, anonymous_bytes())  # the watcher may not have come to see the last tensor
        share = sum(parameter.nbytes for parameter in policy.parameters())
        raise StoppedError

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with patch.object(backend, "wrap", stop), joined_backend(args, int(rank), int(ranks), int(port)):
            pass
    except StoppedError:
        pass
    sys.stdout.write(json.dumps({"share": share, "peak": peak - before}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the process group that was left behind waits for nobody


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")]
)
def test_no_rank_holds_a_second_copy(large_model: Path, flags: tuple[str, ...]) -> None:
    count, port = (2 if flags else 1), str(free_port())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(large_model), str(rank), str(count), port, *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    whole = sum(path.stat().st_size for path in large_model.glob("*.safetensors"))
    assert whole > 1e9
    for rank in ranks:
        output, _ = rank.communicate(timeout=500)
        measured = json.loads(output.splitlines()[-1])
        assert whole / count * 0.9 < measured["share"] < whole / count * 1.1
        sys.stdout.write(
            f"{flags}: share {measured['share'] / 1e6:.0f} MB, peak {measured['peak'] / 1e6:.0f} MB\n"
        )
        # Memory that the imports had freed is used again: the peak may be a little below the share.
        assert 0.95 * measured["share"] < measured["peak"] <= ALLOWED * measured["share"] + BUCKET
