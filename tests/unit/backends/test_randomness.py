"""A rank's random generators come back as they were; other ranks are seeded anew, always alike."""

from __future__ import annotations

import logging
import random

import numpy as np
import torch

from slime.backends.randomness import load_random_state, save_random_state, seed_rank


def draw() -> list[float]:
    """Draw from all three, normal numbers too: their generators keep the second of each pair."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),
        float(np.random.random()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_the_generators_go_on(tmp_path):
    seed_rank(3, 0)
    draw()
    tracker = {"model-parallel": torch.arange(5, dtype=torch.uint8)}
    save_random_state(tmp_path, 0, tracker)
    expected = [draw(), draw()]
    seed_rank(4, 0)
    assert draw() != expected[0]
    trackers = load_random_state(tmp_path, 0, 1, seed=3, steps=7)
    assert [draw(), draw()] == expected
    assert trackers is not None
    assert torch.equal(trackers["model-parallel"], tracker["model-parallel"])


def test_every_rank_has_its_own(tmp_path):
    for rank in (0, 1):
        seed_rank(3, rank)
        save_random_state(tmp_path, rank)
    drawn = []
    for rank in (0, 1):
        load_random_state(tmp_path, rank, 2, seed=0, steps=0)
        drawn.append(draw())
        seed_rank(3, rank)
        assert draw() == drawn[rank]
    assert drawn[0] != drawn[1]


def test_another_number_of_ranks_is_seeded_anew_and_the_log_says_so(tmp_path, caplog):
    seed_rank(3, 0)
    save_random_state(tmp_path, 0)
    at_saving = draw()
    drawn = []
    for rank, steps in ((0, 5), (0, 5), (1, 5), (0, 6)):
        with caplog.at_level(logging.WARNING):
            assert load_random_state(tmp_path, rank, 2, seed=3, steps=steps) is None
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert len({tuple(numbers) for numbers in [at_saving, *drawn]}) == 4
    assert (
        "generators of 1 ranks and there are 2: seeded anew from --seed 3, rank 0 and step 5" in caplog.text
    )
