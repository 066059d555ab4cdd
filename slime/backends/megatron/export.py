"""Sharded parameters back into the tensors of a Hugging Face folder, one after the other.

What belongs together (a parameter, or the experts of a layer) is gathered from the ranks that share it, laid
out as the checkpoint has it, and handed to the other pipeline stages. No rank holds more than one such unit
beside its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from slime.backends.megatron.parallel import Ranks
from slime.backends.megatron.parameters import Named
from slime.backends.megatron.shape import ModelShape
from slime.backends.megatron.weights import Piece, Weight, describe, of_expert

Read = Callable[[Named], Tensor]
"""What of a parameter is exported: the weight itself, or something of its shape."""


@dataclass(frozen=True)
class Unit:
    """Checkpoint tensors that are made together."""

    name: str
    stage: int
    """The pipeline stage that has the parameters."""
    sources: dict[str, tuple[int, ...]]
    """Checkpoint tensors and their whole shapes."""


class Exporter:
    """Knows the units of the whole model, in a fixed order that is the same on every rank."""

    def __init__(
        self, parameters: Sequence[Named], shape: ModelShape, ranks: Ranks, device: torch.device
    ) -> None:
        """Agree on the units. Collective."""
        self._shape = shape
        self._ranks = ranks
        self._device = device
        self._mine: dict[str, list[Named]] = {}
        for named in parameters:
            self._mine.setdefault(named.weight.unit, []).append(named)
        self._places: list[tuple[int, int]] = [ranks.expert_place] * ranks.experts.size()
        dist.all_gather_object(self._places, ranks.expert_place, group=ranks.experts)
        self._units = list(self._agree())

    def _agree(self) -> Iterator[Unit]:
        mine = {
            unit: {source: size for named in members for source, size in named.weight.sources.items()}
            for unit, members in self._mine.items()
        }
        # Experts of Qwen3 are tensors of their own: only all expert-parallel ranks together know them.
        of_experts: list[dict[str, dict[str, tuple[int, ...]]]] = [{}] * self._ranks.experts.size()
        dist.all_gather_object(of_experts, mine, group=self._ranks.experts)
        mine = {unit: {s: n for each in of_experts for s, n in each[unit].items()} for unit in mine}
        stages: list[dict[str, dict[str, tuple[int, ...]]]] = [{}] * self._ranks.pipeline.size()
        dist.all_gather_object(stages, mine, group=self._ranks.pipeline)
        seen: set[str] = set()
        for stage, units in enumerate(stages):
            for unit, sources in units.items():
                if seen.isdisjoint(sources):  # else it is a tied head, exported as the embedding
                    seen.update(sources)
                    yield Unit(unit, stage, sources)

    def export(self, dtype: torch.dtype, read: Read | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole tensor of everything in the checkpoint's layout; `read` None: the weights.

        Collective: every rank goes through all, and gets all.
        """
        for unit in self._units:
            yield from self._gather(unit, dtype, read or _weight).items()

    @torch.no_grad()
    def _gather(self, unit: Unit, dtype: torch.dtype, read: Read) -> dict[str, Tensor]:
        whole = {
            name: torch.empty(size, dtype=dtype, device=self._device) for name, size in unit.sources.items()
        }
        if self._ranks.pipeline.rank() == unit.stage:
            members = self._mine[unit.name]
            shards = [read(named).to(dtype) for named in members]
            if members[0].weight.split == "expert":
                self._join_experts(members[0].name, shards, whole)
            else:
                self._join(members[0].weight, shards[0], whole)
        return {name: self._ranks.broadcast_from_stage(tensor, unit.stage) for name, tensor in whole.items()}

    def _join(self, weight: Weight, shard: Tensor, whole: dict[str, Tensor]) -> None:
        shards = [shard] if weight.split == "whole" else _gathered(shard, self._ranks.tensor)
        for rank, part in enumerate(shards):
            _place(part, weight.pieces(rank, len(shards)), whole)

    def _join_experts(self, name: str, shards: Sequence[Tensor], whole: dict[str, Tensor]) -> None:
        """Join the experts of a layer: each rank of their group has as many, other ones or other slices."""
        gathered = _gathered(torch.stack(list(shards)), self._ranks.experts)
        for (expert_rank, slice_rank), parts in zip(self._places, gathered, strict=True):
            for number, part in enumerate(parts):
                expert = expert_rank * len(shards) + number
                weight = describe(self._shape, of_expert(name, expert), tuple(part.shape))
                _place(part, weight.pieces(slice_rank, self._ranks.sizes.expert_tensor), whole)


def _weight(named: Named) -> Tensor:
    return named.parameter.data


def _gathered(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the shards of all ranks of a group. Collective."""
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _place(shard: Tensor, pieces: Sequence[Piece], whole: dict[str, Tensor]) -> None:
    """Copy a shard's rows to where they are in the checkpoint's tensors."""
    for piece in pieces:
        target = whole[piece.source]
        if piece.expert is not None:
            target = target[piece.expert]
        rows = shard[piece.rows]
        target[piece.block].copy_(rows.T if piece.transposed else rows)
