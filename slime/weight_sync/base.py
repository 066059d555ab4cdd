"""What carries weights from the training ranks to the engines, whichever way it takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from slime.engines.control import EngineControl

Parameters = Iterable[tuple[str, Tensor]]
"""Names and gathered tensors, as a Hugging Face folder holds them; a tensor is valid until the next one is
asked for. Gathering is collective, so every rank goes through all of them."""


@dataclass(frozen=True, kw_only=True)
class EngineMember:
    """One of the student's engines, as those know it who bring it weights."""

    url: str
    num_gpus: int = 1
    """Its tensor parallel ranks; 1 on a CPU."""
    incarnation: int = 0
    """How often its server was started anew: a new process is in no group and holds the first weights."""


def drain(parameters: Parameters) -> None:
    """Go through all of them and keep none: a rank that only helps the others to gather."""
    for _ in parameters:
        pass


class WeightSender(Protocol):
    """One training rank's part in bringing weights to engines that are held still meanwhile."""

    needs_session: bool
    """Whether the engines take such updates only between `/begin_weight_update` and `/end_weight_update`."""

    async def send(
        self, parameters: Parameters, engines: Sequence[EngineMember], control: EngineControl, version: str
    ) -> int:
        """Load `parameters` into every engine and name them `version`; return the bytes that were read.

        Every rank calls it; the one that leads speaks to the engines. No rank holds more than a bucket beside
        its own share of the model.

        Raises:
            EngineError: an engine refused, or is gone.
        """
        ...

    def drain(self, parameters: Parameters) -> None:
        """Go through what is left of an update that this rank has given up, in step with the others."""
        ...
