"""How long a step waits for requests that may still come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from slime.engines.transformers_engine import batcher
from slime.engines.transformers_engine.batcher import Batcher


@pytest.mark.parametrize(
    ("rows", "scoring", "hold"),
    [
        (0, [False, False], batcher.HOLD_SECONDS_IDLE),
        (0, [True, False], batcher.HOLD_SECONDS_IDLE),
        (0, [True, True], batcher.HOLD_SECONDS_BUSY),
        (2, [False], batcher.HOLD_SECONDS_BUSY),
    ],
)
def test_scores_are_not_held_until_the_last_response_has_come(rows, scoring, hold):
    waiting = SimpleNamespace(jobs=lambda: [SimpleNamespace(scoring=one) for one in scoring])
    stepper = SimpleNamespace(model=None, rows=[None] * rows, waiting=waiting)
    assert Batcher(cast(Any, stepper), "0", lambda: None)._patience()[1] == hold
