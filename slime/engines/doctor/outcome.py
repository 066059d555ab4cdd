"""What a check found: one line for the reader, one record for the JSON file, and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

NUMERICS_REMEDY = "the teacher's weights or numerics are broken: try another --dtype or attention backend"

Status = Literal["pass", "warn", "FAULT", "skip"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check of one teacher."""

    check: str
    status: Status
    message: str
    """What was measured."""
    fault: str = ""
    """The name of what is wrong, as `picture-dropped`; empty where nothing is."""
    remedy: str = ""
    teacher: str = ""
    """Address of the server; empty where it is about all of them."""
    values: dict[str, Any] = field(default_factory=dict)
    """The measured numbers, for the JSON file."""

    def line(self, with_teacher: bool = False) -> str:
        """Return the one printed line."""
        where = f"{self.teacher}  " if with_teacher and self.teacher else ""
        named = f"[{self.fault}] " if self.fault else ""
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.status:<5}  {where}{self.check:<15}  {named}{self.message}{remedy}"


class Fault(Exception):  # noqa: N818 (it is a finding of the server, not an error of ours)
    """A check found something wrong: its name, what was seen, what to do."""

    def __init__(self, name: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.name = name
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check that found no fault returns; a warning has a name."""

    message: str
    warning: str = ""
    remedy: str = ""
    skipped: bool = False
    values: dict[str, Any] = field(default_factory=dict)


def record(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return the JSON form of an examination."""
    return {
        "healthy": exit_code(outcomes) == 0,
        "seconds": round(seconds, 3),
        "checks": [asdict(outcome) for outcome in outcomes],
    }


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return 0 where nothing is wrong (warnings allowed), 1 where something is."""
    return int(any(outcome.status == "FAULT" for outcome in outcomes))
