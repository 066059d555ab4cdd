"""What the doctor's tests share: the checkpoints, and what a run of it found."""

from collections.abc import Callable
from dataclasses import dataclass

from slime.tiny.paths import checkpoint_path
from tests.fakes.planting_proxy import Json

TEACHER, STUDENT = checkpoint_path("teacher"), checkpoint_path("student")


@dataclass(frozen=True)
class Diagnosis:
    """One run of the doctor."""

    code: int
    printed: str
    checks: dict[str, Json]
    """The last outcome of each check."""
    healthy: bool

    @property
    def faults(self) -> dict[str, str]:
        """The names of the faults, by check."""
        return {name: check["fault"] for name, check in self.checks.items() if check["status"] == "FAULT"}

    @property
    def first_fault(self) -> Json:
        """The check that failed first; what follows from it comes later."""
        return next(check for check in self.checks.values() if check["status"] == "FAULT")

    def skipped(self) -> list[str]:
        """The checks that were left out."""
        return [name for name, check in self.checks.items() if check["status"] == "skip"]


Examine = Callable[..., Diagnosis]
