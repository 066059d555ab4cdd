"""What the run's flags ask of the servers that it starts."""

from __future__ import annotations

import pytest

from slime.ray.engine_actor import server_flags
from slime.tiny.paths import checkpoint_path
from tests.fakes.training import make_args

OURS = ("--engine", "transformers")
SGLANG = ("--engine", "sglang")


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (OURS, []),
        ((*OURS, "--deterministic-rollout"), ["--deterministic"]),
        (SGLANG, []),
        ((*SGLANG, "--sglang-log-level", "debug"), ["--log-level", "debug"]),
        ((*SGLANG, "--colocate", "--weight-sync", "tensor"), ["--enable-memory-saver"]),
    ],
)
def test_a_flag_reaches_the_server(flags, asked):
    args = make_args(checkpoint_path("student"), "--rm-type", "math", *flags)
    assert server_flags(args) == asked
