"""On-policy distillation, one rollout at a time: `python -m slime.train`.

    prompts -> student rollout -> teacher scores -> advantages -> train step -> weight sync -> eval

Everything heavy runs in Ray actors; this file only says in which order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from slime.arguments import Args, format_args, parse_args
from slime.checkpoints import (
    RunState,
    begin_checkpoint,
    finish_checkpoint,
    local_model,
    newest_checkpoint,
    resume_point,
)
from slime.metrics.closing import close_run
from slime.metrics.tracker import Tracker
from slime.ray.cluster import ActorError, Cluster
from slime.ray.engine_group import EngineGroup, ExternalEngines
from slime.ray.interrupts import exit_status, ignore, listen
from slime.ray.rollout_group import ReplayGroup, RolloutGroup
from slime.ray.train_group import TrainGroup
from slime.rollout.recording.head import RecordingError
from slime.rollout.recording.places import require_recorded
from slime.skipping.account import TrainingStuckError
from slime.supply import Supply
from slime.weight_sync.probe import WeightMismatchError
from slime.weight_sync.store import create_weight_folder


def train(args: Args, tracker: Tracker, rollouts: RolloutGroup, trainers: TrainGroup) -> RunState:
    """Run the loop from the start, or from where `--load` stands, to `--num-rollout`."""
    state, checkpoint = resume_point(args.load)
    ask_teacher = args.eval_teacher and state.teacher is None
    teacher = rollouts.evaluate_later(state.rollout_id, "teacher") if ask_teacher else None
    trainers.wait_ready()
    rollouts.wait_ready()
    if checkpoint is not None:
        trainers.load(checkpoint)
        rollouts.load_state_dict(state.data)
    trainers.publish_weights(rollouts)
    rollouts.when_engines_are_lost(lambda: trainers.publish_weights(rollouts))
    if teacher is not None:
        state.teacher = tracker.log_eval(state.rollout_id, trainers.step, rollouts.result(teacher), "teacher")

    supply = Supply(args, rollouts, trainers, tracker.trace)
    for rollout_id in range(state.rollout_id, args.num_rollout):
        if eval_is_due(args, rollout_id):
            evaluate(rollout_id, tracker, rollouts, trainers, state)
        rollout = supply.take(rollout_id)
        metrics = rollout.metrics | trainers.train(rollout_id, rollout.shards)
        supply.settle()
        require_progress(args, tracker, rollout_id, trainers, metrics)
        state.advance(tokens=int(metrics["response_tokens"]))
        if save_is_due(args, state.rollout_id):
            metrics |= save(args, supply, trainers, state)
        metrics |= trainers.publish_weights(rollouts)
        tracker.log(rollout_id, trainers.step, metrics | supply.end_turn())

    if args.eval_sets:
        evaluate(args.num_rollout, tracker, rollouts, trainers, state)
    trainers.finish()
    return state


def require_progress(
    args: Args, tracker: Tracker, rollout_id: int, trainers: TrainGroup, metrics: dict[str, float]
) -> None:
    """Say which optimizer steps of the rollout were skipped.

    Raises:
        TrainingStuckError: too many in a row. The rollout's metrics are recorded, nothing is saved.
    """
    for step in trainers.skips.latest:
        tracker.say(f"Warning: an optimizer step was skipped. {step}")
    if trainers.skips.too_many:
        tracker.log(rollout_id, trainers.step, metrics)
        raise trainers.skips.stuck(newest_checkpoint(args.save, args.load))


def evaluate(
    rollout_id: int, tracker: Tracker, rollouts: RolloutGroup, trainers: TrainGroup, state: RunState
) -> None:
    """Let the student answer the held-out sets with the weights it has before rollout `rollout_id`."""
    metrics = rollouts.evaluate(rollout_id, "student")
    state.saw_student(tracker.log_eval(rollout_id, trainers.step, metrics, "student"), rollout_id)


def save(args: Args, supply: Supply, trainers: TrainGroup, state: RunState) -> dict[str, float]:
    """Write a checkpoint below `--save`: trainer, position in the data, and the driver's own state."""
    start = time.perf_counter()
    state.data = supply.state_dict()
    partial = begin_checkpoint(Path(args.save or ""), state.rollout_id)
    trainers.save(partial)
    finish_checkpoint(partial, state)
    return {"perf/save_seconds": time.perf_counter() - start}


def eval_is_due(args: Args, rollout_id: int) -> bool:
    """Tell whether to evaluate before this rollout: the first one, and every `--eval-interval` after it."""
    if not args.eval_sets:
        return False
    if rollout_id == 0:
        return not args.skip_eval_before_train
    return args.eval_interval is not None and rollout_id % args.eval_interval == 0


def save_is_due(args: Args, done: int) -> bool:
    """Tell whether to save after `done` rollouts: every `--save-interval` of them, and after the last."""
    if args.save is None:
        return False
    return done == args.num_rollout or (args.save_interval is not None and done % args.save_interval == 0)


def run(args: Args) -> None:
    """Start everything, train, and leave nothing behind but the output folder."""
    started = time.monotonic()
    output_dir = Path(args.output_dir)
    if args.replays:
        require_recorded(args, first=resume_point(args.load)[0].rollout_id)
    checkpoint = local_model(args.hf_checkpoint)
    args = replace(args, hf_checkpoint=str(checkpoint))
    with Tracker(args) as tracker, Cluster(args) as cluster:
        tracker.say(cluster.resources.describe())
        tracker.trace.source = cluster.take_spans
        with ExitStack() as stack:
            folder = None
            if args.weight_sync == "disk":
                folder = stack.enter_context(
                    create_weight_folder(output_dir, checkpoint, one_machine=cluster.one_machine)
                ).path
            rollouts, trainers = start(args, cluster, folder)
            state = train(args, tracker, rollouts, trainers)
        close_run(args, tracker, state, time.monotonic() - started)


def start(args: Args, cluster: Cluster, weight_folder: Path | None) -> tuple[RolloutGroup, TrainGroup]:
    """Start both sides of the loop. On shared GPUs the trainers come first, and put their memory away."""
    if args.replays:
        return ReplayGroup(cluster, args), TrainGroup(cluster, args, weight_folder)
    if args.colocate:
        trainers = TrainGroup(cluster, args, weight_folder)
        engines = EngineGroup(cluster, args, trainers.make_room())
        trainers.take_turns(engines)
        return RolloutGroup(cluster, args, engines), trainers
    # On several nodes the ranks choose first: they need whole nodes' shares.
    trainers = None if cluster.one_machine else TrainGroup(cluster, args, weight_folder)
    engines = ExternalEngines(args) if args.rollout_engine_urls else EngineGroup(cluster, args)
    rollouts = RolloutGroup(cluster, args, engines)
    return rollouts, trainers or TrainGroup(cluster, args, weight_folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, print the configuration, run.

    Return 1 if an actor failed, a recorded rollout is not there or training is stuck, and 130 or 143 after
    SIGINT or SIGTERM.
    """
    args = parse_args(None if argv is None else list(argv))
    listen()
    sys.stdout.write(format_args(args) + "\n")
    sys.stdout.flush()
    try:
        run(args)
    except KeyboardInterrupt:
        ignore()
        sys.stderr.write("Interrupted; everything that this run started has been ended.\n")
        return exit_status()
    except (ActorError, RecordingError, TrainingStuckError, WeightMismatchError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
