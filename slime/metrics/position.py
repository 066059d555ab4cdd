"""The metrics of a run that was interrupted: read, and cut back to where it goes on.

What was logged after the checkpoint comes again; no rollout may be in a file twice.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from slime.durable import write_file

METRICS_FILE = "metrics.jsonl"
DROPPED_FILE = "metrics.dropped.jsonl"


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """Return the records of `metrics.jsonl`, oldest first; none if there is no file. Null reads as NaN."""
    path = output_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        for line in lines
    ]


def drop_metrics(output_dir: Path, first_rollout: int) -> int:
    """Move the lines of `metrics.jsonl` of `first_rollout` and after it to a file of their own; return how
    many there were.

    An evaluation's line has the number of the rollout that comes after it, so it goes too. A line that was
    cut off as it was written goes whatever it was of.
    """
    path = output_dir / METRICS_FILE
    if not path.exists():
        return 0
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        (kept if _is_before(line, first_rollout) else dropped).append(line)
    if dropped:
        with (output_dir / DROPPED_FILE).open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in dropped)
        write_file(path, "".join(line + "\n" for line in kept))
    return len(dropped)


def mark_start(folder: Path, first_rollout: int) -> None:
    """Tell TensorBoard where this process begins.

    At every such mark but a run's first it forgets what it has read of `first_rollout` and after it.
    """
    writer = EventFileWriter(str(folder))
    events: Any = event_pb2  # its classes are made at run time
    start = events.SessionLog(status=events.SessionLog.START)
    writer.add_event(events.Event(wall_time=time.time(), step=first_rollout, session_log=start))
    writer.close()


def _is_before(line: str, first_rollout: int) -> bool:
    try:
        return json.loads(line)["rollout_id"] < first_rollout
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
