"""Tensors whose content waits in the host's memory while the device is needed for something else.

The storages are emptied, not replaced: every parameter, view and optimizer state that lies in one finds its
content again afterwards, whoever else (FSDP, an optimizer) holds it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Parking:
    """Contents of emptied storages. The host's memory is kept from one time to the next: pinned, it is dear
    to get."""

    def __init__(self) -> None:
        self._parked: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._places: dict[int, Tensor] = {}

    def park(self, tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> None:
        """Move the content of the tensors' storages to the host and give their memory back; storages that
        tensors of `but` lie in stay."""
        devices = set()
        kept = {storage._cdata for storage in _storages(but)}  # pyright: ignore[reportPrivateUsage]
        for storage in _storages(tensors):
            if storage._cdata in kept:  # pyright: ignore[reportPrivateUsage]
                continue
            size = storage.nbytes()
            if not size or storage.device.type == "meta":
                continue
            key = storage._cdata  # pyright: ignore[reportPrivateUsage]
            place = self._places.get(key)
            if place is None or place.numel() != size:
                place = torch.empty(size, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                self._places[key] = place
            place.copy_(_bytes(storage), non_blocking=True)
            self._parked[key] = (storage, place)
            devices.add(storage.device)
        _synchronize(devices)
        for storage, _ in self._parked.values():
            storage.resize_(0)
        if any(device.type == "cuda" for device in devices):
            torch.cuda.empty_cache()

    def unpark(self) -> None:
        """Bring everything back."""
        for storage, place in self._parked.values():
            storage.resize_(place.numel())
            _bytes(storage).copy_(place, non_blocking=True)
        _synchronize({storage.device for storage, _ in self._parked.values()})
        self._parked.clear()


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages that the tensors, or this rank's parts of them, lie in, each once."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.detach().untyped_storage()
        found[storage._cdata] = storage  # pyright: ignore[reportPrivateUsage]
    return list(found.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
