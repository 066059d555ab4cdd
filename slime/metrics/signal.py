"""What the teacher's signal looked like at the start and at the end of a run, as a table. Pure."""

from __future__ import annotations

from collections.abc import Sequence

Record = dict[str, float]

ROWS = (
    ("opd_reverse_kl", "reverse KL, all tokens"),
    ("signal/first_token_kl", "… first token"),
    ("signal/last_token_kl", "… end of the response"),
    ("signal/thinking_kl", "… inside the thought"),
    ("signal/answer_kl", "… outside the thought"),
    ("signal/finished_kl", "… finished responses"),
    ("signal/truncated_kl", "… truncated responses"),
    ("signal/teacher_prefers_share", "tokens that the teacher finds likelier"),
    ("entropy", "entropy of the student"),
    ("signal/teacher_entropy", "entropy of the teacher (top-k and tail)"),
    ("signal/teacher_top_k_mass", "teacher's mass on its top-k"),
    ("signal/student_top_k_mass", "student's mass on it"),
    ("signal/teacher_tail_mass", "teacher's mass outside"),
    ("signal/top_k_overlap", "overlap of both top-k sets"),
    ("adv/opd_share", "teacher's share of the gradient"),
    ("train_rollout_logprob_abs_diff", "trainer and engine apart"),
    ("tis_weight_mean", "importance weight, mean"),
    ("tis_clipfrac", "importance weights cut"),
)
"""Metric and its name in the table: KL and entropy in nats a token, the others shares of 1."""


def signal_changes(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return each metric's mean over the first and over the last tenth of the rollouts that have it."""
    rollouts = [record for record in records if "opd_reverse_kl" in record]
    changes: dict[str, tuple[float, float]] = {}
    for metric, _ in ROWS:
        values = [record[metric] for record in rollouts if metric in record]
        if values:
            tenth = max(1, len(values) // 10)
            changes[metric] = _mean(values[:tenth]), _mean(values[-tenth:])
    return changes


def render_signal(changes: dict[str, tuple[float, float]]) -> str:
    """Return the table as text; nothing where nothing was distilled."""
    shown = [(label, *changes[metric]) for metric, label in ROWS if metric in changes]
    if not shown:
        return ""
    width = max(len(label) for label, _, _ in shown)
    lines = [f"{'The signal (nats a token, shares of 1)':<{width}}  {'first':>8}  {'last':>8}"]
    lines += [f"{label:<{width}}  {first:>8.4f}  {last:>8.4f}" for label, first, last in shown]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
