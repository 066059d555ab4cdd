"""The table, and what it ran on."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence

import torch
import transformers

from scripts.checks.gpu.result import Row, Status

MARKS: dict[Status, str] = {
    "passed": "passed",
    "failed": "**FAILED**",
    "skipped": "**skipped**",
    "measured": "—",
}
ORDER: tuple[Status, ...] = ("passed", "failed", "skipped")


def heading(device: str, seconds: float) -> str:
    """Say what the table was made on."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    cuda = f" (CUDA {torch.version.cuda})" if torch.version.cuda else ""
    return (
        f"{device_name(device)}; torch {torch.__version__}{cuda}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}; {today}; {seconds / 60:.1f} minutes."
    )


def device_name(device: str) -> str:
    """Return what a device is called, with its memory."""
    if device == "cpu":
        return f"CPU ({platform.machine()}), tiny sizes: no figure of this table is about a GPU"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def table(rows: Sequence[Row]) -> str:
    """Return all rows as a Markdown table."""
    lines = ["| check | what | found | allowed | |", "|---|---|--:|--:|---|"]
    for row in rows:
        mark = MARKS[row.status] + (f": {_cell(row.why)}" if row.why else "")
        lines.append(f"| {row.check} | {_cell(row.what)} | {_cell(row.found)} | {row.limit} | {mark} |")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Count what passed and what did not."""
    counts = {status: sum(row.status == status for row in rows) for status in ORDER}
    return ", ".join(f"{count} {status}" for status, count in counts.items()) + "."


def all_passed(rows: Sequence[Row]) -> bool:
    """Tell whether every row that says anything passed; what was skipped has not."""
    return all(row.status in ("passed", "measured") for row in rows)


def _cell(text: str) -> str:
    """Return text that ends no cell and no line of a table."""
    return " ".join(text.replace("|", "/").split())
