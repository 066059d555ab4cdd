"""How much of the scoring is hidden behind the generation."""

from __future__ import annotations

import pytest

from slime.rollout.clock import Clock


@pytest.mark.parametrize(
    ("responses", "starts", "ends", "exposed"),
    [
        ([1.0, 3.0], [1.0, 3.0], [2.0, 5.0], 0.5),  # of 4 s, 2 after the last response
        ([1.0, 3.0], [1.0, 3.0], [2.0, 3.0], 0.0),
        ([1.0, 1.0], [1.5, 1.5], [2.0, 2.5], 1.0),  # after the whole batch
        ([1.0], [1.25], [2.25], 1.0),
    ],
)
def test_exposed_is_what_comes_after_the_last_response(responses, starts, ends, exposed):
    clock = Clock()
    clock.response_ends, clock.score_starts, clock.score_ends = responses, starts, ends
    assert clock.exposed_seconds / clock.scoring_seconds == exposed
