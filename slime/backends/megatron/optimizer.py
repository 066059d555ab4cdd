"""Megatron's AdamW, plain or sharded over the data-parallel ranks (ZeRO-1), stepped part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from slime.backends.megatron.model import PolicyModel

if TYPE_CHECKING:
    from slime.arguments import Args


def wrap(args: Args, model: PolicyModel) -> DistributedDataParallel:
    """Return the model with buffers of float32 gradients, which are added up over ranks after the last
    micro-batch."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the backend says where, and steps nothing
    )
    return DistributedDataParallel(model.config, config, model)


def fuses(model: torch.nn.Module) -> bool:
    """Tell whether torch's AdamW steps this model in its fused kernel: the other one holds a further copy of
    all weights while it steps."""
    return next(model.parameters()).device.type == "cuda"


class Stepper:
    """AdamW over a wrapped model's parameters; vectors (norms, biases) do not decay."""

    def __init__(self, args: Args, model: DistributedDataParallel, dtype: torch.dtype) -> None:
        self._model = model
        self.optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=args.lr,
                weight_decay=args.weight_decay,
                adam_beta1=args.adam_beta1,
                adam_beta2=args.adam_beta2,
                adam_eps=args.adam_eps,
                clip_grad=args.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=args.use_distributed_optimizer,
            ),
            [model],
            use_gloo_process_groups=False,
        )
        self._clip_grad = args.clip_grad
        for group in self.optimizer.param_groups:
            # Megatron leaves this to its own schedule of weight decay.
            group["weight_decay"] = args.weight_decay * group["wd_mult"]
        for part in self.parts:
            # Without TransformerEngine and Apex it is torch's, for which Megatron chooses no kernel.
            if isinstance(part.optimizer, torch.optim.AdamW) and fuses(model):
                for group in part.optimizer.param_groups:
                    group["fused"], group["foreach"] = True, False

    @property
    def parts(self) -> list[MegatronOptimizer]:
        """The optimizers behind Megatron's one: that of experts on other ranks is apart."""
        return self.optimizer.chained_optimizers

    def gradient_norm(self) -> float:
        """Return the 2-norm of all gradients of all ranks, before clipping. Collective."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def step(self, norm: float, lr: float) -> None:
        """Clip gradients of this norm and step. Collective."""
        parameters: list[Tensor] = [each for part in self.parts for each in part.get_parameters()]
        if self._clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, self._clip_grad, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step_with_ready_grads()
        self.zero()

    def memory(self) -> Iterator[Tensor]:
        """Yield what is on the device for the optimizer's sake: gradients, what it steps, what it keeps.

        What it steps may be the weights themselves, or lie among them.
        """
        model: Any = self._model
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            yield buffer.grad_data
        for part in self.parts:
            inner: Any = part.optimizer
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def zero(self) -> None:
        """Forget all gradients."""
        self._model.zero_grad_buffer()
        self.optimizer.zero_grad()
