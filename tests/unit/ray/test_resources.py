"""The student's share of a cluster, divided by the flags of the training command."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from slime.ray.resources import plan_resources


@dataclass(frozen=True)
class _Args:
    actor_num_nodes: int = 1
    actor_num_gpus_per_node: int = 1
    rollout_num_gpus: int | None = None
    rollout_num_gpus_per_engine: int = 1
    rollout_engine_urls: tuple[str, ...] = ()
    replays: bool = False
    engine: str = "sglang"
    colocate: bool = False
    weight_sync: str = "disk"

    @property
    def num_train_ranks(self) -> int:
        return self.actor_num_nodes * self.actor_num_gpus_per_node


def test_a_cpu_has_one_rank_and_one_engine_unless_told():
    plan = plan_resources(_Args(engine="transformers"), 0)
    assert (plan.num_ranks, plan.num_engines) == (1, 1)
    assert plan.gpus_per_rank == plan.gpus_per_engine == 0
    plan = plan_resources(_Args(actor_num_gpus_per_node=2, rollout_num_gpus=2), 0)
    assert (plan.num_ranks, plan.num_engines) == (2, 2)
    assert "on the CPU" in plan.describe()


def test_gpus_that_do_not_train_generate():
    plan = plan_resources(_Args(actor_num_gpus_per_node=4, rollout_num_gpus_per_engine=2), 8)
    assert (plan.num_ranks, plan.gpus_per_rank) == (4, 1)
    assert (plan.num_engines, plan.gpus_per_engine) == (2, 2)


def test_the_launchers_form_for_16_gpus():
    plan = plan_resources(_Args(actor_num_gpus_per_node=4, rollout_num_gpus=4), 8)
    assert (plan.num_ranks, plan.num_engines) == (4, 4)


def test_one_gpu_is_shared_by_the_light_engine_alone():
    plan = plan_resources(_Args(engine="transformers", rollout_num_gpus=1), 1)
    assert plan.gpus_per_rank + plan.gpus_per_engine <= 1
    assert "share one GPU" in plan.describe()
    with pytest.raises(ValueError, match="--colocate"):
        plan_resources(_Args(engine="sglang", rollout_num_gpus=1), 1)


def test_engines_elsewhere_leave_all_gpus_to_training():
    plan = plan_resources(_Args(actor_num_gpus_per_node=4, rollout_engine_urls=("http://h:1",)), 4)
    assert (plan.num_ranks, plan.num_engines) == (4, 0)
    assert plan_resources(_Args(rollout_engine_urls=("http://h:1",)), 0).num_engines == 0


def test_a_replay_has_no_engine_and_leaves_all_gpus_to_training():
    plan = plan_resources(_Args(actor_num_gpus_per_node=4, rollout_num_gpus=4, replays=True), 4)
    assert (plan.num_ranks, plan.gpus_per_rank, plan.num_engines) == (4, 1, 0)
    assert plan_resources(_Args(replays=True), 0).num_engines == 0


@pytest.mark.parametrize(
    ("args", "num_gpus", "names"),
    [
        (_Args(actor_num_gpus_per_node=4, rollout_num_gpus=8), 8, "--rollout-num-gpus 8"),
        (_Args(actor_num_gpus_per_node=9), 8, "9 training ranks"),
        (
            _Args(actor_num_gpus_per_node=5, rollout_num_gpus_per_engine=2),
            8,
            "--rollout-num-gpus-per-engine 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_flag(args, num_gpus, names):
    with pytest.raises(ValueError, match=names):
        plan_resources(args, num_gpus)


def test_colocated_engines_have_the_gpus_of_the_ranks():
    args = _Args(
        actor_num_gpus_per_node=4, rollout_num_gpus_per_engine=2, colocate=True, weight_sync="tensor"
    )
    plan = plan_resources(args, 4)
    assert (plan.num_ranks, plan.gpus_per_rank) == (4, 1)
    assert (plan.num_engines, plan.gpus_per_engine) == (2, 2)
    assert plan.colocated
    assert "taking turns" in plan.describe()
    with pytest.raises(ValueError, match="sees 3 GPUs and 4 training ranks"):
        plan_resources(args, 3)


def test_what_a_cpu_or_gpus_apart_cannot_do_is_refused():
    with pytest.raises(ValueError, match="SGLang server on a CPU"):
        plan_resources(_Args(colocate=True), 0)
    assert plan_resources(_Args(colocate=True, engine="transformers"), 0).colocated
    with pytest.raises(ValueError, match="without --colocate"):
        plan_resources(_Args(weight_sync="tensor"), 2)
    with pytest.raises(ValueError, match="--weight-sync distributed needs a GPU of its own"):
        plan_resources(_Args(engine="transformers", weight_sync="distributed", rollout_num_gpus=1), 1)
