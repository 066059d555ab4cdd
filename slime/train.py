"""On-policy distillation, one rollout at a time: `python -m slime.train`.

    prompts -> student rollout -> teacher scores -> advantages -> train step -> weight sync -> eval

Everything heavy runs in Ray actors; this file only says in which order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from slime.arguments import Args, format_args, parse_args
from slime.checkpoints import (
    CheckpointError,
    ResumePoint,
    RunState,
    describe,
    newest_checkpoint,
    require_same_run,
    resume_point,
)
from slime.durable import FolderInUseError, locked
from slime.local_models import with_local_models
from slime.metrics.closing import close_run
from slime.metrics.tracker import Tracker
from slime.ray.cluster import ActorError, Cluster
from slime.ray.engine_group import EngineGroup, ExternalEngines
from slime.ray.held_teacher import evaluate_held_teacher
from slime.ray.interrupts import exit_status, held, ignore, listen
from slime.ray.rollout_group import ReplayGroup, RolloutGroup
from slime.ray.train_group import TrainGroup
from slime.rollout.recording.head import RecordingError
from slime.rollout.recording.places import require_recorded
from slime.saving import SaveError, Saver
from slime.skipping.account import TrainingStuckError
from slime.supply import Supply
from slime.weight_sync.probe import WeightMismatchError
from slime.weight_sync.store import create_weight_folder

ENDS = (
    ActorError,
    CheckpointError,
    FolderInUseError,
    RecordingError,
    SaveError,
    TrainingStuckError,
    WeightMismatchError,
)
"""Errors whose message says all that there is to say."""


def train(
    args: Args, point: ResumePoint, tracker: Tracker, rollouts: RolloutGroup, trainers: TrainGroup
) -> RunState:
    """Run the loop from where it begins, or goes on, to `--num-rollout`."""
    state, checkpoint = point.state, point.checkpoint
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
    saver = Saver(args, trainers)
    with saver.saving_at_a_signal(state, rollouts):
        for rollout_id in range(state.rollout_id, args.num_rollout):
            if eval_is_due(args, rollout_id):
                evaluate(rollout_id, tracker, rollouts, trainers, state)
            rollout = supply.take(rollout_id)
            with held() as signals:  # from here to the end of the turn nothing is cut short but a rollout
                metrics = rollout.metrics | trainers.train(rollout_id, rollout.shards)
                state.advance(int(metrics["response_tokens"]), supply.state_dict())
                try:
                    with signals.heeded():
                        supply.settle()
                    require_progress(args, tracker, trainers)
                except (KeyboardInterrupt, TrainingStuckError):  # the training has happened all the same
                    tracker.log(rollout_id, trainers.step, metrics | supply.end_turn())
                    raise
                metrics |= saver.write(state) | trainers.publish_weights(rollouts)
                tracker.log(rollout_id, trainers.step, metrics | supply.end_turn())
                saver.complete(state)

    if args.eval_sets:
        evaluate(state.rollout_id, tracker, rollouts, trainers, state)
    trainers.finish()
    return state


def require_progress(args: Args, tracker: Tracker, trainers: TrainGroup) -> None:
    """Say which optimizer steps of the rollout were skipped.

    Raises:
        TrainingStuckError: too many in a row.
    """
    for step in trainers.skips.latest:
        tracker.say(f"Warning: an optimizer step was skipped. {step}")
    if trainers.skips.too_many:
        raise trainers.skips.stuck(newest_checkpoint(args.save, args.load))


def evaluate(
    rollout_id: int, tracker: Tracker, rollouts: RolloutGroup, trainers: TrainGroup, state: RunState
) -> None:
    """Let the student answer the held-out sets with the weights it has before rollout `rollout_id`."""
    metrics = rollouts.evaluate(rollout_id, "student")
    state.saw_student(tracker.log_eval(rollout_id, trainers.step, metrics, "student"), rollout_id)


def eval_is_due(args: Args, rollout_id: int) -> bool:
    """Tell whether to evaluate before this rollout: the first one, and every `--eval-interval` after it."""
    if not args.eval_sets:
        return False
    if rollout_id == 0:
        return not args.skip_eval_before_train
    return args.eval_interval is not None and rollout_id % args.eval_interval == 0


def run(args: Args) -> None:
    """Start everything, train, and leave nothing behind but the output folder."""
    output_dir = Path(args.output_dir)
    point = resume_point(args.load)
    if args.replays:
        require_recorded(args, first=point.state.rollout_id)
    args = with_local_models(args)
    require_same_run(args, point)
    with locked(output_dir), Tracker(args, first_rollout=point.state.rollout_id) as tracker:
        for line in describe(args, point):
            tracker.say(line)
        if args.eval_teacher and args.opd_teacher_load is not None and point.state.teacher is None:
            accuracies = evaluate_held_teacher(args)
            point.state.teacher = tracker.log_eval(point.state.rollout_id, 0, accuracies, "teacher")
        with Cluster(args) as cluster, ExitStack() as stack:
            tracker.say(cluster.resources.describe())
            tracker.trace.source = cluster.take_spans
            folder = None
            if args.weight_sync == "disk":
                student = Path(args.hf_checkpoint)
                store = create_weight_folder(output_dir, student, one_machine=cluster.one_machine)
                folder = stack.enter_context(store).path
            rollouts, trainers = start(args, cluster, folder)
            state = train(args, point, tracker, rollouts, trainers)
            close_run(args, tracker, state)


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

    Return 1 if an actor failed, a checkpoint or recorded rollout is not to be had or training is stuck, and
    130 or 143 after SIGINT or SIGTERM.
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
    except ENDS as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
