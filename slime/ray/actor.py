"""What every actor shares: a log of its own, surroundings from the driver, a call that ends only with it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

from slime.metrics.trace import Span, Stopwatch

LOG_FOLDER = "logs"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What an actor takes over from the driver. An argument, because Ray logs a runtime environment."""

    output_dir: str
    log_level: str
    environment: Mapping[str, str]
    """Variables to set: keys of the engines among them."""
    terminal: str | None
    """The driver's terminal, where it has one and the actors share its machine."""


class Actor:
    """Base of the actors. Heavy modules are imported in methods, after the environment is set here."""

    def __init__(self, name: str, surroundings: Surroundings, *, on_terminal: bool = False) -> None:
        """Take the surroundings over and send standard error to the actor's log.

        Standard output stays with Ray, which shows it on the driver's console: it is where plugins print.
        With `on_terminal`, what Python writes to standard error goes to the driver's terminal: the progress
        bar.
        """
        self.stopwatch = Stopwatch()
        os.environ.update(surroundings.environment)
        path = log_path(surroundings.output_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", buffering=1, encoding="utf-8")
        os.dup2(log.fileno(), sys.stderr.fileno())
        logging.basicConfig(
            stream=log,
            level=surroundings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            force=True,
        )
        if on_terminal and surroundings.terminal is not None:
            # It stays open for the actor's life.
            sys.stderr = open(surroundings.terminal, "w", encoding="utf-8")  # noqa: SIM115

    @ray.method(concurrency_group="control")
    def watch(self) -> None:
        """Wait for ever: the caller learns of the actor's death by the end of this call."""
        threading.Event().wait()

    @ray.method(concurrency_group="control")
    def take_spans(self) -> list[Span]:
        """Return the stages that ended since the last call."""
        return self.stopwatch.take()


def log_path(output_dir: str, name: str) -> Path:
    """Return where the actor (or server) `name` of a run writes its log."""
    return Path(output_dir).resolve() / LOG_FOLDER / f"{name}.log"


def terminal_name() -> str | None:
    """Return the path of the terminal that our standard error is, or None."""
    return os.ttyname(sys.stderr.fileno()) if sys.stderr.isatty() else None
