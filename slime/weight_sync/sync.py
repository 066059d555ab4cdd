"""A training rank's side of bringing fresh weights to the engines: hold them still, send, let them go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slime.engines.control import STUDENT_REMEDY, EngineControl
from slime.engines.errors import EnginesLostError, EngineUnreachableError
from slime.weight_sync.base import EngineMember, Parameters, WeightSender
from slime.weight_sync.checked import checked
from slime.weight_sync.disk import DiskSender
from slime.weight_sync.distributed import DistributedSender
from slime.weight_sync.tensor import TensorSender

if TYPE_CHECKING:
    from slime.arguments import Args


class WeightSync:
    """Brings weights to engines. Every rank has one; the one that leads speaks to the engines."""

    def __init__(self, sender: WeightSender, checkpoint: Path, *, leads: bool, timeout: float) -> None:
        """`checkpoint` is what the engines were started from; `timeout` the seconds that a verb may take."""
        self._sender = sender
        self._checkpoint = checkpoint
        self._leads = leads
        self._timeout = timeout

    def publish(self, parameters: Parameters, engines: Sequence[EngineMember], version: str) -> int:
        """Load `parameters` into all engines as `version`; return the bytes that were read. Collective.

        Until it returns the engines generate nothing. An engine that fails leaves them so: what it holds
        then is neither the old weights nor the new ones.

        Raises:
            EnginesLostError: an engine is gone. All ranks have come to the end all the same, and may publish
                again.
            EngineError: an engine refused.
            RuntimeError: they are not the weights of the checkpoint that the engines were started from.
        """
        stream = checked(parameters, self._checkpoint)
        try:
            return asyncio.run(self._publish(stream, engines, version))
        except EngineUnreachableError as error:
            self._sender.drain(stream)  # the other ranks gather with this one
            raise EnginesLostError(str(error)) from error

    async def _publish(self, parameters: Parameters, engines: Sequence[EngineMember], version: str) -> int:
        async with EngineControl(
            [engine.url for engine in engines],
            role="student engine",
            remedy=STUDENT_REMEDY,
            timeout=self._timeout,
            # A server that is gone is started anew, knows no session then, and gets all weights once more.
            patience=0.0,
        ) as control:
            if not self._leads:
                return await self._sender.send(parameters, engines, control, version)
            async with self._held(control):
                return await self._sender.send(parameters, engines, control, version)

    @asynccontextmanager
    async def _held(self, control: EngineControl) -> AsyncIterator[None]:
        """Retract what the engines run, and let it begin anew, on the new weights alone, afterwards."""
        await control.pause("retract")
        if self._sender.needs_session:
            await control.begin_weight_update()
        yield
        if self._sender.needs_session:
            await control.end_weight_update()
        await control.flush_cache()
        await control.continue_()


def create_weight_sync(args: Args, rank: int, folder: Path | None, address: str) -> WeightSync:
    """Return this rank's side of the way that `--weight-sync` names.

    Args:
        args: the run's.
        rank: 0 leads.
        folder: where `disk` writes; None with the others.
        address: this machine's, as the engines reach it.
    """
    leads, checkpoint = rank == 0, Path(args.hf_checkpoint)
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    size = args.update_weight_buffer_size
    sender: WeightSender
    if args.weight_sync == "disk":
        assert folder is not None
        sender = DiskSender(folder, checkpoint, leads=leads)
    elif args.weight_sync == "tensor":
        sender = TensorSender(leads=leads, device=device, bucket_bytes=size)
    else:
        sender = DistributedSender(leads=leads, device=device, bucket_bytes=size, address=address)
    return WeightSync(sender, checkpoint, leads=leads, timeout=args.request_timeout)
