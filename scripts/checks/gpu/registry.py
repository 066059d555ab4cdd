"""The checks by name, in the order in which they run: the cheap ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module

from scripts.checks.gpu.result import Row
from scripts.checks.gpu.setting import Setting


@dataclass(frozen=True, slots=True)
class Check:
    """A module of this package, and the seconds that it may take."""

    name: str
    module: str
    seconds: float

    def function(self) -> Callable[[Setting], Iterable[Row]]:
        """Import the module; return its `run`."""
        return import_module(f"scripts.checks.gpu.{self.module}").run


CHECKS = {
    check.name: check
    for check in (
        Check("losses", "losses", 90),
        Check("attention", "attention", 90),
        Check("trainer", "trainer_step", 120),
        Check("engine", "engine", 210),
        Check("throughput", "throughput", 300),
    )
}
