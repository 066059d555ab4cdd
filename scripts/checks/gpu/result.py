"""A row of the table: what was looked at, what was found, what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped", "measured"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line. A measurement has no limit: it is there to be read."""

    check: str
    what: str
    found: str = ""
    limit: str = ""
    status: Status
    why: str = ""
    """What went wrong, or keeps it from running."""


def within(check: str, what: str, found: float, limit: float) -> Row:
    """Return a row that passes where `found` is at most `limit`; what is no number fails."""
    status: Status = "passed" if found <= limit else "failed"
    return Row(check=check, what=what, found=f"{found:.2g}", limit=f"≤ {limit:g}", status=status)


def at_least(check: str, what: str, found: float, limit: float, form: str = "{:.2g}") -> Row:
    """Return a row that passes where `found` is at least `limit`; what is no number fails."""
    status: Status = "passed" if found >= limit else "failed"
    shown, bound = form.format(found), form.format(limit)
    return Row(check=check, what=what, found=shown, limit=f"≥ {bound}", status=status)


def measured(check: str, what: str, found: str) -> Row:
    """Return a row with a figure that nothing depends on."""
    return Row(check=check, what=what, found=found, status="measured")


def skipped(check: str, what: str, why: str) -> Row:
    """Return a row of what cannot run here. The table as a whole has then not passed."""
    return Row(check=check, what=what, status="skipped", why=why)


def failed(check: str, what: str, why: str) -> Row:
    """Return a row of what should have run and did not."""
    return Row(check=check, what=what, status="failed", why=why)


def relative_gap(found: float, expected: float) -> float:
    """Return how far two numbers are apart, as a share of the expected one."""
    return abs(found - expected) / max(abs(expected), 1e-30)
