"""What every test shares: single-threaded torch, no access to hubs or to a user's keys, the same examples in
every run."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Set before a test module imports transformers or datasets: a missing file is an error, not a download.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A busy machine is slow, which is no fault of an example; and what one run finds, the next must find too. The
# tests marked slow look for new examples (`derandomize=False`).
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Keep the machine's cores for the servers that tests start, and sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide `SLIME_SCRIPT_*` and keys of the caller's shell from the tests."""
    for name in [*os.environ]:
        if name.startswith(("SLIME_SCRIPT_", "SLIME_ENGINE_")) or name in {"WANDB_API_KEY", "HF_TOKEN"}:
            monkeypatch.delenv(name)
