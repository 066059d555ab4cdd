"""How skipped steps are counted, and what a run says that has had too many."""

from __future__ import annotations

import math
from pathlib import Path

from slime.skipping.account import MOST_SUSPECTS, SkipAccount, SkippedStep, Suspect, joined


def step(rollout_id: int, number: int = 0, *suspects: Suspect) -> SkippedStep:
    return SkippedStep(
        rollout_id=rollout_id,
        number=number,
        version=7,
        loss=math.nan,
        grad_norm=math.nan,
        reason="the loss is nan",
        suspects=suspects,
    )


def suspect(sample: int, gap: float = 1.0, batch_loss: float | None = None) -> Suspect:
    return Suspect(sample=sample, group=sample // 2, gap=gap, batch_loss=batch_loss)


def test_only_steps_in_a_row_end_the_run() -> None:
    account = SkipAccount(limit=3)
    account.enter(2, [step(0, 0), step(0, 1)])
    assert not account.too_many
    account.enter(2, [step(1, 1)])
    assert [(each.rollout_id, each.number) for each in account.in_a_row] == [(1, 1)]
    assert account.latest == [step(1, 1)]
    account.enter(1, [step(2)])
    assert not account.too_many
    account.enter(1, [])
    assert account.in_a_row == account.latest == []
    for rollout_id in (4, 5, 6):
        assert not account.too_many
        account.enter(1, [step(rollout_id)])
    assert account.too_many


def test_a_step_taken_after_too_many_does_not_save_the_run() -> None:
    account = SkipAccount(limit=2)
    account.enter(4, [step(0, 0), step(0, 1)])
    assert account.too_many
    assert [each.number for each in account.in_a_row] == [0, 1]


def test_the_error_says_all_that_is_known() -> None:
    account = SkipAccount(limit=2)
    account.enter(1, [step(3, 0, suspect(12, math.inf, math.nan), suspect(9, 4.25, math.nan))])
    account.enter(1, [step(4, 0, suspect(40, 31.5))])
    text = str(account.stuck(Path("out/rollout-000003")))
    assert text.startswith(
        "2 optimizer steps in a row were skipped (--max-skipped-steps 2); the weights are "
    )
    assert (
        "rollout 3, optimizer step 0 (weight version 7): the loss is nan; loss nan, grad_norm nan; samples "
        "of micro-batches whose loss is not finite, worst first: 12 (group 6): a log-prob is not finite, 9 "
        "(group 4): 4.25 nats apart\n"
    ) in text
    assert "rollout 4, optimizer step 0 (weight version 7)" in text
    assert "samples, worst first: 40 (group 20): 31.5 nats apart\n" in text
    assert "The last checkpoint is out/rollout-000003; --load goes on from there." in text
    assert "There is no checkpoint (--save and --save-interval write them)." in str(account.stuck(None))


def test_suspects_of_all_ranks_are_joined_worst_first() -> None:
    ranks = [
        [step(0, 1, suspect(1, 3.0), suspect(2, 1.0)), step(0, 2)],
        [step(0, 1, suspect(3, 2.0), suspect(1, 3.0)), step(0, 2, suspect(9))],
    ]
    one, other = joined(ranks)
    assert [each.sample for each in one.suspects] == [1, 3, 2]
    assert [each.sample for each in other.suspects] == [9]
    many = [[step(0, 0, *(suspect(number, number) for number in range(first, 20, 2)))] for first in (0, 1)]
    assert [each.sample for each in joined(many)[0].suspects] == list(range(19, 19 - MOST_SUSPECTS, -1))


def test_only_samples_of_broken_micro_batches_are_named_where_there_are_some() -> None:
    """Another rank's worst are innocent then."""
    ranks = [[step(0, 0, suspect(1, 99.0))], [step(0, 0, suspect(5, 0.5, math.nan))]]
    assert [each.sample for each in joined(ranks)[0].suspects] == [5]
