"""What a run takes of GPUs' and host's memory, in bytes: lower bounds, from the number of parameters alone.

Per trained parameter: 4 bytes of the float32 weight, 4 of its gradient, 8 of Adam's two moments. Activations,
buffers and whatever libraries reserve come on top and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from slime.arguments import Args
from slime.preflight.launch import Launch
from slime.preflight.weights import Weights

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
BYTES = {"float32": 4, "bfloat16": 2}
PROCESS_BYTES = 400 * 2**20
"""Of a Python process that has imported torch, about."""


class Need(NamedTuple):
    """A part of what a run takes."""

    label: str
    size: float
    sure: bool = True
    """False: an estimate of what is usual, no lower bound."""


def trained(args: Args, student: Weights) -> int:
    """Return how many of the student's parameters are trained."""
    return student.parameters - (student.vision if args.freeze_vision_tower else 0)


def state_bytes(args: Args, student: Weights) -> float:
    """Return the size of weights and moments: what a checkpoint holds and what offloading moves."""
    return WEIGHT * student.parameters + MOMENTS * trained(args, student)


def training_bytes(args: Args, student: Weights) -> float:
    """Return what training takes on one rank's GPU."""
    moving = trained(args, student)
    if args.train_backend == "fsdp":
        return (state_bytes(args, student) + GRADIENT * moving) / args.num_train_ranks
    copies = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    copies *= args.expert_model_parallel_size
    compute = BYTES[args.precision] if args.precision != "float32" else 0  # beside the optimizer's float32
    optimizer = state_bytes(args, student) / (
        args.num_train_ranks if args.use_distributed_optimizer else copies
    )
    return (compute * student.parameters + GRADIENT * moving) / copies + optimizer


def engine_bytes(args: Args, student: Weights) -> float:
    """Return the size of the weights in one engine of the student."""
    return BYTES[args.engine_dtype or args.precision] * student.parameters


def num_engines(args: Args) -> int:
    """Return how many engines of its own a run starts without a GPU."""
    if args.rollout_engine_urls or args.replays:
        return 0
    return max(1, (args.rollout_num_gpus or 0) // args.rollout_num_gpus_per_engine)


def gpu_needs(launch: Launch) -> Iterator[tuple[str, Need]]:
    """Yield (GPU, need) for all that lives on one; of what takes turns there, the larger."""
    args, student, teacher = launch.args, launch.student, launch.taught_by
    if launch.teacher is not None and teacher is not None:
        for gpu in launch.teacher.gpus:
            yield gpu, Need("the teacher's weights", teacher.stored / len(launch.teacher.gpus))
    if student is None or not launch.student_gpus:
        return
    ranks = args.num_train_ranks // args.actor_num_nodes
    training = Need("training", training_bytes(args, student))
    engine = Need(
        "an engine's weights", engine_bytes(args, student) / max(1, args.rollout_num_gpus_per_engine)
    )
    engines = 0 if args.rollout_engine_urls or args.replays else (args.rollout_num_gpus or 0)
    if args.colocate:
        for gpu in launch.student_gpus[:ranks]:
            yield gpu, max(training, engine, key=lambda need: need.size)
        return
    for gpu in launch.student_gpus[:ranks]:
        yield gpu, training
    for gpu in launch.student_gpus[-engines:] if engines else ():
        yield gpu, engine


def host_needs(launch: Launch) -> Iterator[Need]:
    """Yield what a run takes of this machine's memory."""
    args, student, teacher = launch.args, launch.student, launch.taught_by
    if launch.student_gpus:
        if args.colocate and student is not None:
            yield Need(
                "the trainers' weights and moments, while engines have the GPUs",
                state_bytes(args, student) / args.actor_num_nodes,
            )
        if args.train_backend == "megatron":
            for flag, held in launch.beside.items():
                yield Need(f"the model of {flag}, held for the trainers", held.stored)
    else:
        if student is not None:
            yield Need("training", state_bytes(args, student) + GRADIENT * trained(args, student))
            yield Need("the student's engines", engine_bytes(args, student) * num_engines(args))
        for flag, held in launch.beside.items():
            yield Need(f"the model of {flag}", BYTES[args.precision] * held.parameters)
        if teacher is not None and launch.teacher is not None and not launch.teacher.gpus:
            yield Need("the teacher", teacher.stored)
    processes = args.num_train_ranks // args.actor_num_nodes + max(1, num_engines(args)) + 3
    yield Need("its processes", processes * PROCESS_BYTES, sure=False)
