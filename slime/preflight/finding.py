"""What a check found, and all findings as a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
TIGHT = 0.9
"""Share of what is free beyond which a need is worth a warning: lower bounds leave things out."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem."""

    check: str
    what: str
    """What was found, and what is needed."""
    remedy: str
    fatal: bool = True
    """Whether the run surely fails; otherwise it may."""


def report(findings: Sequence[Finding], checks: int) -> str:
    """Return all findings as a text, errors before warnings; `checks` is how many were made."""
    errors = [finding for finding in findings if finding.fatal]
    warnings = [finding for finding in findings if not finding.fatal]
    if not findings:
        return f"Preflight: {checks} checks passed."
    if errors:
        head = f"Preflight: {counted(len(errors), 'error')}, {counted(len(warnings), 'warning')}."
    else:
        head = f"Preflight: {checks} checks passed, with {counted(len(warnings), 'warning')}."
    lines = [head]
    for title, chosen in (("error", errors), ("warning", warnings)):
        for finding in chosen:
            lines += [f"  {title}, {finding.check}: {finding.what}", f"    remedy: {finding.remedy}"]
    return "\n".join(lines)


def counted(count: int, noun: str) -> str:
    """Return `2 errors`, `1 error`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def amount(size: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
