"""Which ranks share what: the sizes of parallelism, refusals of combinations, Megatron's process groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from slime.backends.megatron.layout import Sharing
from slime.backends.megatron.shape import ModelShape

if TYPE_CHECKING:
    from slime.arguments import Args


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """Sizes, as the flags give them."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @staticmethod
    def of(args: Args) -> Parallelism:
        """Read the flags; experts are split like the rest unless a flag says otherwise."""
        tensor = args.tensor_model_parallel_size
        given = args.expert_tensor_parallel_size
        return Parallelism(
            tensor=tensor,
            sequence=args.sequence_parallel,
            pipeline=args.pipeline_model_parallel_size,
            context=args.context_parallel_size,
            expert=args.expert_model_parallel_size,
            expert_tensor=tensor if given is None else given,
        )

    @property
    def data(self) -> int:
        """Ranks that train on other samples, as far as this process group reaches."""
        return dist.get_world_size() // (self.tensor * self.pipeline * self.context)

    def refusals(self, shape: ModelShape, *, has_experts: bool = False) -> Iterator[str]:
        """Yield why a model of this shape cannot be trained so: each would fail late or train wrongly.

        `has_experts` says that it, or another model beside it, is a mixture of experts.
        """
        mixture = shape.experts > 0
        if shape.kv_heads % self.tensor:
            yield (
                f"--tensor-model-parallel-size {self.tensor} does not divide the model's {shape.kv_heads} "
                f"heads of keys. Choose a divisor of {shape.kv_heads}."
            )
        if not mixture and shape.ffn % self.tensor:
            yield (
                f"--tensor-model-parallel-size {self.tensor} does not divide the {shape.ffn} columns of the "
                f"model's MLP. Choose a divisor of {shape.ffn}."
            )
        if shape.layers % self.pipeline:
            yield (
                f"--pipeline-model-parallel-size {self.pipeline} does not divide the model's {shape.layers} "
                f"layers. Choose a divisor of {shape.layers}."
            )
        if shape.deepstack_levels > shape.layers // self.pipeline:
            yield (
                f"--pipeline-model-parallel-size {self.pipeline} leaves {shape.layers // self.pipeline} "
                "layers to the first stage, and features of the picture go into the first "
                f"{shape.deepstack_levels} (deepstack): those of later stages would be lost. Use fewer "
                "stages."
            )
        if not (mixture or has_experts) and (self.expert > 1 or self.expert_tensor != self.tensor):
            yield (
                "--expert-model-parallel-size and --expert-tensor-parallel-size are about a mixture of "
                "experts, and the model is dense. Drop them."
            )
        if not mixture:
            return
        if shape.experts % self.expert:
            yield (
                f"--expert-model-parallel-size {self.expert} does not divide the model's {shape.experts} "
                "experts. Choose a divisor."
            )
        if shape.expert_ffn % self.expert_tensor:
            yield (
                f"--expert-tensor-parallel-size {self.expert_tensor} (--tensor-model-parallel-size unless "
                f"given) does not divide the {shape.expert_ffn} columns of an expert. Choose a divisor of "
                f"{shape.expert_ffn}."
            )
        if self.expert == 1 and self.expert_tensor != self.tensor:
            yield (
                f"--expert-tensor-parallel-size {self.expert_tensor} beside --tensor-model-parallel-size "
                f"{self.tensor} and no expert parallelism: Megatron does not add up the gradients of the "
                "experts' copies, which drift apart. Make the two equal, or --expert-model-parallel-size "
                "above 1."
            )
        if self.tensor > 1 and not self.sequence:
            yield (
                "a mixture of experts under --tensor-model-parallel-size needs --sequence-parallel: without "
                "it every rank sends every token to the experts. Add it."
            )


class Ranks:
    """This rank's place among the others; made when the process group is up, and ended by `close`."""

    def __init__(self, sizes: Parallelism, *, seed: int, on_cpu: bool) -> None:
        """Make Megatron's process groups. Collective."""
        self.sizes = sizes
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor,
            pipeline_model_parallel_size=sizes.pipeline,
            context_parallel_size=sizes.context,
            expert_model_parallel_size=sizes.expert,
            expert_tensor_parallel_size=sizes.expert_tensor,
            create_gloo_process_groups=False,  # of Megatron's own checkpoints, which we do not write
        )
        # A CPU has no CUDA generator: the tracker made for inference forks nothing. Dropout is 0.
        tensor_parallel.model_parallel_cuda_manual_seed(
            seed, inference_rng_tracker=on_cpu, force_reset_rng=True
        )
        state: Any = parallel_state
        self.tensor: dist.ProcessGroup = state.get_tensor_model_parallel_group()
        self.pipeline: dist.ProcessGroup = state.get_pipeline_model_parallel_group()
        self.context: dist.ProcessGroup = state.get_context_parallel_group()
        self.data: dist.ProcessGroup = state.get_data_parallel_group()
        self.experts: dist.ProcessGroup = state.get_expert_tensor_and_model_parallel_group()
        self.is_first_stage = parallel_state.is_pipeline_first_stage()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.expert_place: tuple[int, int] = (
            state.get_expert_model_parallel_rank(),
            state.get_expert_tensor_parallel_rank(),
        )
        """Among the ranks of expert parallelism, and among those that share an expert."""

    @property
    def generators(self) -> Any:
        """Megatron's random generators of a GPU: the one for what ranks hold alike, and those for shards."""
        return tensor_parallel.get_cuda_rng_tracker()

    @property
    def sharing(self) -> Sharing:
        """How a row is shared, seen from this rank."""
        return Sharing(
            context=self.sizes.context,
            context_rank=self.context.rank(),
            sequence=self.sizes.tensor if self.sizes.sequence else 1,
        )

    def from_last_stage(self, value: object) -> object:
        """Return the last stage's `value` on all stages. Collective."""
        if self.sizes.pipeline == 1:
            return value
        box = [value]
        dist.broadcast_object_list(
            box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=self.pipeline
        )
        return box[0]

    def broadcast_from_stage(self, tensor: Tensor, stage: int) -> Tensor:
        """Fill `tensor` with what pipeline stage `stage` has in it. Collective."""
        if self.sizes.pipeline > 1:
            dist.broadcast(tensor, group=self.pipeline, group_src=stage)
        return tensor

    def longest(self, counts: list[int], device: torch.device) -> list[int]:
        """Return, entry by entry, the largest over the ranks whose tokens meet at the experts. Collective."""
        largest = torch.tensor(counts, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.experts)
        return largest.tolist()

    def close(self) -> None:
        """Forget the process groups."""
        parallel_state.destroy_model_parallel()
