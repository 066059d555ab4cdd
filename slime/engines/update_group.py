"""Process groups between a trainer and its engines: how either side joins one, and waits for the other.

A group is made the way SGLang makes its own, outside the default one, since trainer and engines of any kind
meet in it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,  # pyright: ignore[reportPrivateUsage]
    _world,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


def join_update_group(
    address: str, port: int, *, rank: int, world_size: int, name: str, backend: str, timeout: timedelta
) -> ProcessGroup:
    """Join the group `name`, which meets at rank 0's address; return when all have, or the time is out.

    torch has no public way to form a group with processes of another world; SGLang uses these same functions.
    """
    host = f"[{address}]" if ":" in address else address
    store, rank, world_size = next(rendezvous(f"tcp://{host}:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timeout,
    )
    assert isinstance(group, ProcessGroup)
    _world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return group


async def in_own_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run what may wait long for the other side in a thread that nobody waits for once this is given up.

    A broadcast ends when all have come, or by its time limit; neither the end of a process nor the message of
    a side that refuses to come must wait for that.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001 (whatever it is, whoever waits gets it)
            settle(done.set_exception, error)
        else:
            settle(done.set_result, result)

    def settle(how: Callable[[Any], None], what: Any) -> None:
        with suppress(RuntimeError):  # the loop has gone
            loop.call_soon_threadsafe(lambda: None if done.done() else how(what))

    threading.Thread(target=work, name="weight-update-group", daemon=True).start()
    return await done
