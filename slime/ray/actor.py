"""What every actor shares: a log of its own, keys from the driver, and a call that ends only with it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import ray

LOG_FOLDER = "logs"


class Actor:
    """Base of the actors. Heavy modules are imported in their methods, after the environment is set here."""

    def __init__(self, name: str, output_dir: str, environment: Mapping[str, str], log_level: str) -> None:
        """Take `environment` over and send standard error to the actor's log.

        Standard output stays with Ray, which shows it on the driver's console: it is where plugins print.
        """
        os.environ.update(environment)
        path = log_path(output_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        logging.basicConfig(
            level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )

    @ray.method(concurrency_group="control")
    def watch(self) -> None:
        """Wait for ever: the caller learns of the actor's death by the end of this call."""
        threading.Event().wait()


def log_path(output_dir: str, name: str) -> Path:
    """Return where the actor (or server) `name` of a run writes its log."""
    return Path(output_dir).resolve() / LOG_FOLDER / f"{name}.log"
