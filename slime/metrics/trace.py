"""What waited for what: the stages of a run on one time line, in Chrome's trace-event format.

`trace.json` opens in chrome://tracing and in Perfetto (https://ui.perfetto.dev): a block of rows an actor, a
row a stage. Begins are seconds since the epoch by the clock of the machine that did the work, so the rows of
two machines are as far apart as their clocks. The file is an array whose end both viewers do without: what a
run wrote before it was killed can be read.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRACE_FILE = "trace.json"

Facts = Mapping[str, int | float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stage, once."""

    stage: str
    start: float
    """Seconds since the epoch."""
    seconds: float
    facts: Facts = field(default_factory=dict)
    """What a viewer shows of it: the rollout's number, mostly."""


class Stopwatch:
    """The spans of one process, until they are taken. One thread may measure while another takes."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque()

    @contextmanager
    def stage(self, name: str, **facts: int | float | str) -> Iterator[None]:
        """Measure the block, however it ends."""
        start, begun = time.time(), time.perf_counter()
        try:
            yield
        finally:
            self.add(Span(stage=name, start=start, seconds=time.perf_counter() - begun, facts=facts))

    def add(self, *spans: Span) -> None:
        """Keep spans that were measured elsewhere."""
        self._spans.extend(spans)

    def take(self) -> list[Span]:
        """Return the spans since the last call."""
        return [self._spans.popleft() for _ in range(len(self._spans))]


class Trace:
    """The file. A run that writes into the folder of an earlier one goes on with its file."""

    def __init__(self, output_dir: Path) -> None:
        path = output_dir / TRACE_FILE
        events = read_trace(path)
        self._actors: dict[str, int] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self._recall_rows(events)
        partial = path.with_name(f".{TRACE_FILE}.partial")
        partial.write_text("[\n" + ",\n".join(json.dumps(event) for event in events), encoding="utf-8")
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")
        self._empty = not events
        self.source: Callable[[], Mapping[str, Iterable[Span]]] | None = None
        """Gives what the actors have measured since it was last asked."""

    def add(self, actor: str, *spans: Span) -> None:
        """Write an actor's spans."""
        for span in spans:
            self._write(
                {
                    "name": span.stage,
                    "ph": "X",
                    "pid": self._actor(actor),
                    "tid": self._row(actor, span.stage),
                    "ts": round(span.start * 1e6),
                    "dur": round(span.seconds * 1e6),
                    "args": dict(span.facts),
                }
            )
        self._file.flush()

    def collect(self) -> None:
        """Write what the actors have measured meanwhile."""
        if self.source is not None:
            for actor, spans in self.source().items():
                self.add(actor, *spans)

    def close(self) -> None:
        """End the array. A second call does nothing."""
        if not self._file.closed:
            self._file.write("\n]\n")
            self._file.close()

    def _actor(self, name: str) -> int:
        """Return the number of an actor, which a viewer takes for a process."""
        if name not in self._actors:
            self._actors[name] = len(self._actors) + 1
            self._write(_name("process_name", name, pid=self._actors[name]))
        return self._actors[name]

    def _row(self, actor: str, stage: str) -> int:
        """Return the number of a stage's row, which a viewer takes for a thread."""
        if (actor, stage) not in self._rows:
            self._rows[actor, stage] = len(self._rows) + 1
            number = self._rows[actor, stage]
            self._write(_name("thread_name", stage, pid=self._actor(actor), tid=number))
        return self._rows[actor, stage]

    def _recall_rows(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Give actors and stages the numbers that they have in the file."""
        names: dict[int, str] = {}
        for event in events:
            if event["name"] == "process_name":
                names[event["pid"]] = event["args"]["name"]
                self._actors[names[event["pid"]]] = event["pid"]
            elif event["name"] == "thread_name":
                self._rows[names[event["pid"]], event["args"]["name"]] = event["tid"]

    def _write(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(event) if self._empty else ",\n" + json.dumps(event))
        self._empty = False


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace, whole or cut off; none if there is no file."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            events.append(json.loads(line.removesuffix(",")))
        except json.JSONDecodeError:  # the end, of the array or of what was written of it
            break
    return events


def _name(kind: str, name: str, **numbers: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", **numbers, "args": {"name": name}}
