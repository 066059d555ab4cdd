"""The accuracy of a teacher that the trainers hold: it has no server that could be asked.

Engines like the student's answer for it, before anything of the run needs their place, and end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slime.ray.cluster import Cluster
from slime.ray.engine_group import EngineGroup
from slime.ray.rollout_group import RolloutGroup

if TYPE_CHECKING:
    from slime.arguments import Args

LOG_FOLDER = "teacher_evaluation"


def evaluate_held_teacher(args: Args) -> dict[str, float]:
    """Return the held-out accuracy of the model that `--opd-teacher-load` names, as `evaluate` does.

    Its engines' logs lie in a folder of their own below `--output-dir`.

    Raises:
        ActorError: an engine failed; one that lacks memory needs a larger --rollout-num-gpus-per-engine.
    """
    alone = replace(
        args,
        hf_checkpoint=args.opd_teacher_load,
        output_dir=str(Path(args.output_dir) / LOG_FOLDER),
        rollout_engine_urls=(),
    )
    with Cluster(alone) as cluster:
        rollouts = RolloutGroup(cluster, alone, EngineGroup(cluster, alone))
        rollouts.wait_ready()
        return rollouts.evaluate(0, "student")
