"""What a sync brings is what the engines compute with: three versions by each way, and a server started anew.

Held against transformers' own forward pass in float32 of the weights that were sent.
"""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from slime.engines.process import EngineKind, ServerProcess, free_port, start_server
from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE
from slime.weight_sync.base import EngineMember
from slime.weight_sync.buckets import device_memory, fill_buckets
from slime.weight_sync.sync import create_weight_sync
from tests.contracts.engine_api.conftest import START_SECONDS
from tests.contracts.engine_api.support import (
    MODEL,
    PICTURES,
    PROMPT,
    TEXT_PROMPT,
    Engine,
    input_logprobs,
    picture_uri,
    save_changed_model,
)
from tests.contracts.reference import TOLERANCE, Reference
from tests.fakes.processes import wait_until
from tests.fakes.training import make_args

SCORE = {"sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "logprob_start_len": 0}
TEXT = {"input_ids": TEXT_PROMPT, **SCORE}
PICTURE = {"input_ids": PROMPT, "image_data": [picture_uri("first")], **SCORE}
AFTER_PICTURE = len(PROMPT) - 6
"""Tokens behind the picture and its end."""
BUCKET_BYTES = 200_000
VERSIONS = ("1", "2", "3", "4")
"""Three for both engines as they were started, and one for a pair of which one was started anew."""
KEY = "for-the-control-verbs"


class Version:
    """Some weights, and what transformers makes of them."""

    def __init__(self, folder: Path) -> None:
        self.weights = {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}
        self.bytes = sum(tensor.nbytes for tensor in self.weights.values())
        reference = Reference(folder)
        picture = Image.open(PICTURES / "first.png").convert("RGB")
        text = reference.log_probs(TEXT_PROMPT, [], len(TEXT_PROMPT) - 1)
        self.log_probs = torch.cat([text, reference.log_probs(PROMPT, [picture], AFTER_PICTURE)])
        """Of the text, then of what follows the picture."""


class Pair:
    """Two engines of one kind, either of which can be killed and started anew at its address."""

    def __init__(self, kind: EngineKind, folder: Path) -> None:
        self._kind: EngineKind = kind
        self._folder = folder
        self._ports = [free_port(), free_port()]
        self.servers = [self._start(number) for number in (0, 1)]
        self.incarnations = [0, 0]
        self.wait_ready()

    @property
    def members(self) -> list[EngineMember]:
        """The engines as those know them who bring them weights."""
        numbered = zip(self.servers, self.incarnations, strict=True)
        return [EngineMember(url=server.url, incarnation=number) for server, number in numbered]

    def wait_ready(self) -> None:
        for server in self.servers:
            server.wait_ready(START_SECONDS[self._kind])

    def start_anew(self, number: int) -> None:
        """Kill one as a crash does, and start another in its place."""
        server = self.servers[number]
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: not server.alive, "the server lives")
        server.stop()
        self.servers[number] = self._start(number)
        self.incarnations[number] += 1
        self.wait_ready()

    def scores(self, number: int) -> tuple[set[str], Tensor]:
        """Ask one of them; return the versions that its answers name, and log-probs as `Version` has them."""
        engine = Engine(self._kind, self.servers[number].url, KEY)
        answers: list[Any] = [engine.generate(**body) for body in (TEXT, PICTURE)]
        text, picture = map(input_logprobs, answers)
        versions = {answer["meta_info"]["weight_version"] for answer in answers}
        return versions, torch.tensor([*text[1:], *picture[-AFTER_PICTURE:]])

    def close(self) -> None:
        for server in self.servers:
            server.stop()

    def _start(self, number: int) -> ServerProcess:
        log = self._folder / f"{self._kind}-{number}.log"
        environment = {ADMIN_KEY_VARIABLE: KEY}
        return start_server(
            self._kind, str(MODEL), self._ports[number], log, dtype="float32", env=environment
        )


@pytest.fixture(scope="module", params=["transformers", pytest.param("sglang", marks=pytest.mark.sglang)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(request.param, tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    """The weights of every version: no two alike in any tensor, and told apart by what comes of them."""
    folder = tmp_path_factory.mktemp("versions")
    made = {
        name: Version(save_changed_model(folder / name, seed=number)) for number, name in enumerate(VERSIONS)
    }
    for one, other in itertools.pairwise(VERSIONS):
        assert (made[one].log_probs - made[other].log_probs).abs().max() > 100 * TOLERANCE
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_every_version_reaches_both_engines_and_one_that_was_started_anew(
    pair: Pair, versions: dict[str, Version], way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, KEY)
    folder = tmp_path / "weights"
    folder.mkdir()
    size = ("--update-weight-buffer-size", str(BUCKET_BYTES))
    args = make_args(MODEL, "--rm-type", "math", "--weight-sync", way, *size)
    sync = create_weight_sync(args, 0, folder, "127.0.0.1")
    buckets = fill_buckets(versions["1"].weights.items(), BUCKET_BYTES, device_memory(torch.device("cpu")))
    assert sum(1 for _ in buckets) >= 3
    for version in VERSIONS:
        if version == VERSIONS[-1]:
            pair.start_anew(1)
        before = [pair.scores(number)[1] for number in (0, 1)]  # both have seen the picture
        sent = versions[version]
        assert sync.publish(sent.weights.items(), pair.members, version) == sent.bytes
        for number in (0, 1):
            named, log_probs = pair.scores(number)
            assert named == {version}
            torch.testing.assert_close(log_probs, sent.log_probs, atol=TOLERANCE, rtol=0)
            assert (log_probs - before[number]).abs().max() > 100 * TOLERANCE
