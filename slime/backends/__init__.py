"""Training backends: they shard, run and step a model, and know nothing of rewards, teachers or rollouts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.arguments import Args
    from slime.backends.base import TrainBackend

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others; ends a run in which one of them hangs."""


def create_backend(args: Args, rank: int, world_size: int, masked_ids: Sequence[int] = ()) -> TrainBackend:
    """Join the process group and load the student; every rank calls it.

    Log-probs are those of the policy that samples: a distribution over all tokens but `masked_ids`.

    Reads `MASTER_ADDR` and `MASTER_PORT`, and `LOCAL_RANK`, the number of this rank's GPU among those it
    sees.

    Raises:
        RuntimeError: one of these variables is not set.
        ValueError: the backend cannot train this model so.
    """
    import torch  # seconds to import; whoever only plans batches goes without
    import torch.distributed as dist

    from slime.backends.randomness import seed_rank

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} not set in the environment of training rank {rank}; a process group needs "
            "them all."
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(args.train_threads)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    seed_rank(args.seed, rank)
    if args.train_backend == "megatron":
        from slime.backends.megatron.backend import MegatronBackend

        return MegatronBackend(args, rank, world_size, device, masked_ids)
    from slime.backends.fsdp.backend import FsdpBackend

    return FsdpBackend(args, rank, world_size, device, masked_ids)
