"""The end of a run: table, `summary.json` and picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slime.metrics.position import METRICS_FILE
from slime.metrics.signal import render_signal, signal_changes
from slime.metrics.summary import Summary, gap_closed, render_table, write_summary
from slime.metrics.tracker import Tracker

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.checkpoints import RunState


def close_run(args: Args, tracker: Tracker, state: RunState) -> Summary:
    """Print the closing table and write it, and the picture, into the output folder."""
    from slime.metrics.plot import (
        draw_curves,
    )  # matplotlib takes seconds to import, and only the end needs it

    output_dir = Path(args.output_dir)
    summary = Summary(
        student_before=state.student_before,
        student_after=state.student_after,
        teacher=state.teacher,
        gap_closed=gap_closed(state.student_before, state.student_after, state.teacher),
        rollouts=state.rollout_id,
        student_tokens=state.student_tokens,
        wall_seconds=round(state.wall_seconds, 1),
        backend=args.train_backend,
        engine="replayed" if args.replays else args.engine,
        written_by=args.sample_from,
        signal=signal_changes(tracker.records),
    )
    written = [
        METRICS_FILE,
        write_summary(summary, output_dir).name,
        draw_curves(tracker.records, output_dir).name,
    ]
    if summary.signal:
        tracker.say(render_signal(summary.signal))
    tracker.say(render_table(summary, with_teacher=args.use_opd or bool(args.teacher_urls)))
    tracker.say(f"{output_dir}: {', '.join(written)}")
    return summary
