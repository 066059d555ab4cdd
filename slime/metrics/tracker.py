"""Where every number of a run goes: `metrics.jsonl` always, TensorBoard, wandb where asked, and one console
line.

The driver calls it once per rollout and once per evaluation. It computes nothing: stages hand in flat floats.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TextIO

from tensorboard.summary import Writer

from slime.metrics.position import DROPPED_FILE, METRICS_FILE, drop_metrics, mark_start, read_metrics
from slime.metrics.trace import Trace

TENSORBOARD_FOLDER = "tensorboard"
CONSOLE_COLUMNS = (
    ("kl", "opd_reverse_kl", "{:.3f}"),
    ("reward", "reward", "{:.2f}"),
    ("length", "response_length", "{:.0f}"),
    ("truncated", "truncated_share", "{:.0%}"),
    ("aligned", "teacher/aligned_frac", "{:.0%}"),
    ("grad", "grad_norm", "{:.2g}"),
)
"""(label, metric, format) of the line per rollout; a metric that a run does not have is left out."""
APART_NATS = 0.1
"""Mean distance of log-probs beyond what precision explains: float32 gives 1e-5, bfloat16 some 1e-2."""
CONSOLE_STAGES = ("rollout", "replay", "train", "sync", "save", "export")
"""Stages whose `perf/<stage>_seconds` end the line."""


class TrackerArgs(Protocol):
    """What the tracker reads of the arguments."""

    @property
    def output_dir(self) -> str: ...
    @property
    def num_rollout(self) -> int: ...
    @property
    def use_wandb(self) -> bool: ...
    @property
    def wandb_project(self) -> str: ...
    @property
    def wandb_group(self) -> str | None: ...
    @property
    def wandb_mode(self) -> Literal["online", "offline"]: ...
    def as_dict(self) -> dict[str, Any]: ...


class Tracker:
    """Writes metrics as they come; a line that was logged survives whatever happens after."""

    def __init__(self, args: TrackerArgs, console: TextIO = sys.stdout, *, first_rollout: int = 0) -> None:
        """Go on with what the output folder has of rollouts before `first_rollout`, where the run begins."""
        self.output_dir = Path(args.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._num_rollout = args.num_rollout
        self._console = console
        dropped = drop_metrics(self.output_dir, first_rollout)
        if dropped:
            self.say(
                f"{METRICS_FILE}: what it had of rollout {first_rollout} and later ones comes again "
                f"({dropped} line{'' if dropped == 1 else 's'}, now in {self.output_dir / DROPPED_FILE})."
            )
        self.records: list[dict[str, float]] = read_metrics(self.output_dir)
        self._file = (self.output_dir / METRICS_FILE).open("a", encoding="utf-8")
        self.trace = Trace(self.output_dir)
        mark_start(self.output_dir / TENSORBOARD_FOLDER, first_rollout)
        self._tensorboard = Writer(str(self.output_dir / TENSORBOARD_FOLDER))
        self._wandb = _start_wandb(args)

    def say(self, text: str) -> None:
        """Print `text` on the console."""
        print(text, file=self._console, flush=True)

    def log(self, rollout_id: int, step: int, metrics: Mapping[str, float]) -> None:
        """Record what rollout `rollout_id` gave, after `step` optimizer steps, and print its line."""
        self.trace.collect()
        self._record(rollout_id, step, metrics)
        self.say(console_line(rollout_id, self._num_rollout, metrics))
        difference = metrics.get("train_rollout_logprob_abs_diff", 0.0)
        if difference > APART_NATS and not metrics.get("rollout/steps_behind"):
            self.say(
                f"Warning: engine and trainer are {difference:.2f} nats a token apart on what the engine "
                "sampled; the engine may hold other weights than were published, or compute in a coarser "
                "precision."
            )

    def log_eval(self, rollout_id: int, step: int, metrics: Mapping[str, float], who: str) -> float:
        """Record an evaluation made before rollout `rollout_id`, print its line, and return `eval/accuracy`.

        The teacher's go under names of their own, `teacher_eval/accuracy` and so on.
        """
        if who == "student":
            named = metrics
        else:
            named = {name.replace("eval", who + "_eval", 1): value for name, value in metrics.items()}
        self.trace.collect()
        self._record(rollout_id, step, named)
        self.say(eval_line(rollout_id, metrics, who))
        return metrics["eval/accuracy"]

    def close(self) -> None:
        """Flush and close every output. A second call does nothing."""
        if self._file.closed:
            return
        self._file.close()
        self.trace.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, rollout_id: int, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        record = {"rollout_id": rollout_id, "step": step, **values}
        self.records.append(record)
        # JSON has no NaN; null keeps the line readable for every reader and the hole visible.
        line = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # a checkpoint counts on it
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, rollout_id)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(record)


def console_line(rollout_id: int, num_rollout: int, metrics: Mapping[str, float]) -> str:
    """Return one rollout as one line: what was learned, then where the time went."""
    width = len(str(num_rollout))
    parts = [f"rollout {rollout_id + 1:>{width}}/{num_rollout}"]
    parts += [
        f"{label} {layout.format(metrics[name])}"
        for label, name, layout in CONSOLE_COLUMNS
        if name in metrics
    ]
    stages = [
        f"{stage} {metrics[f'perf/{stage}_seconds']:.1f}"
        for stage in CONSOLE_STAGES
        if f"perf/{stage}_seconds" in metrics
    ]
    line = "  ".join(parts)
    return f"{line}  | {' + '.join(stages)} s" if stages else line


def eval_line(rollout_id: int, metrics: Mapping[str, float], who: str) -> str:
    """Return one evaluation as one line."""
    when = "" if who == "teacher" else f" after {rollout_id} rollout{'' if rollout_id == 1 else 's'}"
    shown = "  ".join(
        f"{name.removeprefix('eval/')} {value:.3f}"
        for name, value in metrics.items()
        if name.endswith("accuracy")
    )
    seconds = metrics.get("perf/eval_seconds")
    return f"eval    {who}{when}: {shown}" + ("" if seconds is None else f"  | {seconds:.1f} s")


def _start_wandb(args: TrackerArgs) -> Any:
    """Return a wandb run where there is a key or it is asked for; otherwise it is not even imported."""
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    if not (has_key or args.use_wandb):
        return None
    import wandb  # takes seconds, and most runs do without it

    return wandb.init(
        project=args.wandb_project,
        group=args.wandb_group,
        mode=args.wandb_mode if has_key else "offline",
        dir=args.output_dir,
        config=args.as_dict(),
        # What it notes of the machine holds the command line, with what a URL on it may hold.
        settings=wandb.Settings(silent=True, console="off", x_disable_meta=True),
    )
