"""A model that is only asked: its weights wait in the CPU's memory, and are on the device while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slime.backends.megatron.model import PolicyModel


class HeldModel:
    """The reference or the teacher beside the student that is trained."""

    def __init__(self, model: PolicyModel, device: torch.device) -> None:
        """Take the model over and move its weights out of the device's memory."""
        self._model = model.requires_grad_(False)
        self._device = device
        self._waiting: list[torch.Tensor] = []
        if device.type == "cuda":
            self._waiting = [parameter.data.cpu().pin_memory() for parameter in model.parameters()]
            self._put_away()

    @contextmanager
    def awake(self) -> Iterator[PolicyModel]:
        """Give the model, on the device, until the block ends."""
        for parameter, waiting in zip(self._model.parameters(), self._waiting, strict=False):
            parameter.data = waiting.to(self._device, non_blocking=True)
        try:
            yield self._model
        finally:
            self._put_away()

    def _put_away(self) -> None:
        for parameter, waiting in zip(self._model.parameters(), self._waiting, strict=False):
            parameter.data = waiting  # nothing has changed them
