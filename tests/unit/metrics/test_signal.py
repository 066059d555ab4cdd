"""The closing report of the teacher's signal."""

from __future__ import annotations

import pytest

from slime.metrics.signal import render_signal, signal_changes


def test_the_first_and_the_last_tenth_are_compared() -> None:
    records = [
        {"opd_reverse_kl": 1.0 - 0.01 * turn, "signal/first_token_kl": float(turn)} for turn in range(20)
    ]
    records.insert(3, {"eval/accuracy": 0.5})
    changes = signal_changes(records)
    assert changes["opd_reverse_kl"] == pytest.approx((0.995, 0.815))
    assert changes["signal/first_token_kl"] == pytest.approx((0.5, 18.5))
    table = render_signal(changes).splitlines()
    assert len(table) == 3
    assert table[1].split()[-2:] == ["0.9950", "0.8150"]


def test_what_only_some_rollouts_have_is_compared_among_them() -> None:
    records = [{"opd_reverse_kl": 1.0}, {"opd_reverse_kl": 0.5, "signal/truncated_kl": 3.0}]
    assert signal_changes(records)["signal/truncated_kl"] == (3.0, 3.0)


def test_without_a_teacher_there_is_nothing_to_tell() -> None:
    assert signal_changes([{"reward": 1.0}]) == {}
    assert render_signal({}) == ""
