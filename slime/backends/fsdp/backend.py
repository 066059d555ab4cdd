"""`FsdpBackend`: the training verbs on a model sharded by FSDP2."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from slime.backends.base import Accepts, LossFn, LossInputs, Metrics, ModelTag
from slime.backends.batching import MicroBatch
from slime.backends.fsdp.checkpoint import load_sharded, save_sharded
from slime.backends.fsdp.export import hf_named_parameters
from slime.backends.fsdp.loading import load_policy
from slime.backends.fsdp.model import PolicyModel, reshard
from slime.backends.fsdp.optimizer import build_adamw, clip_by_norm, global_norm, local_gradients
from slime.backends.parking import Parking
from slime.backends.randomness import RANDOM_FOLDER, load_random_state, save_random_state
from slime.backends.schedule import LearningRate
from slime.backends.scores import Scores, scores_of

if TYPE_CHECKING:
    from slime.arguments import Args


class FsdpBackend:
    """Implements `TrainBackend`; the process group is up before it is made."""

    def __init__(
        self, args: Args, rank: int, world_size: int, device: torch.device, masked_ids: Sequence[int]
    ) -> None:
        """Load and shard the student, and the reference where --kl-loss-coef asks for one. Collective."""
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._seed = args.seed
        self._clip_grad = args.clip_grad
        self._compute_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.precision]
        self._steps = 0
        self._parking = Parking()
        mesh = init_device_mesh(device.type, (world_size,))
        self._student = load_policy(
            args.hf_checkpoint,
            mesh,
            compute_dtype=self._compute_dtype,
            chunk_size=args.logprob_chunk_size,
            masked_ids=masked_ids,
            freeze_vision_tower=args.freeze_vision_tower,
            gradient_checkpointing=args.gradient_checkpointing,
            packed=args.train_layout == "packed",
        )
        self._reference: PolicyModel | None = None
        if args.kl_loss_coef > 0:
            self._reference = load_policy(
                args.ref_load if args.ref_load is not None else args.hf_checkpoint,
                mesh,
                compute_dtype=self._compute_dtype,
                chunk_size=args.logprob_chunk_size,
                masked_ids=masked_ids,
                trainable=False,
                packed=args.train_layout == "packed",
            )
        self._optimizer = build_adamw(
            self._student,
            lr=args.lr,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
            weight_decay=args.weight_decay,
        )
        self._learning_rate = LearningRate(
            lr=args.lr,
            min_lr=args.min_lr,
            style=args.lr_decay_style,
            warmup_steps=args.lr_warmup_iters,
            total_steps=args.num_rollout * args.samples_per_rollout // args.global_batch_size,
        )

    @property
    def weight_version(self) -> int:
        """Optimizer steps taken since the model's first weights."""
        return self._steps

    @torch.no_grad()
    def compute_log_probs(
        self, micro_batches: Sequence[MicroBatch], model: ModelTag = "student"
    ) -> list[Tensor]:
        """Return, per micro-batch, the log-probs [P] of its response tokens, on the CPU."""
        return [scores.log_probs for scores in self.score(micro_batches, model)]

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch], model: ModelTag, top_k: int = 0) -> list[Scores]:
        """Return, per micro-batch, what the model says of its responses, on the CPU."""
        policy = self._model(model)
        return [
            policy(batch.to(self._device), lambda outputs: scores_of(outputs, top_k))
            for batch in micro_batches
        ]

    def _model(self, model: ModelTag) -> PolicyModel:
        if model == "student":
            return self._student
        if model == "teacher":
            raise ValueError(
                "--opd-type megatron loads the teacher inside Megatron; with --train-backend fsdp serve it "
                "and use --opd-type sglang."
            )
        if self._reference is None:
            raise ValueError("the reference model is loaded only with --kl-loss-coef above 0; set it.")
        return self._reference

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> Metrics:
        """Accumulate the gradients of all micro-batches; return sums over all ranks, `loss` among them."""
        totals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for batch in micro_batches:
            on_device = batch.to(self._device)

            def use(outputs: LossInputs, batch: MicroBatch = on_device) -> tuple[Tensor, dict[str, Tensor]]:
                loss, sums = loss_fn(outputs, batch)
                return loss, dict(sums)

            loss, sums = self._student(on_device, use)
            loss.backward()
            losses.append(loss.detach())
            for name, value in sums.items():
                totals[name] = totals.get(name, 0) + value.double()
        totals["loss"] = torch.stack(losses).double().sum()
        return self._add_over_ranks(totals)

    def _add_over_ranks(self, totals: dict[str, Tensor]) -> Metrics:
        names = sorted(totals)
        values = torch.stack([totals[name] for name in names]).to(self._device)
        dist.all_reduce(values)
        return dict(zip(names, values.tolist(), strict=True))

    def optim_step(self, accepts: Accepts = math.isfinite) -> Metrics:
        """Clip, step, advance the schedule, zero the gradients; the last alone where the norm is refused."""
        pieces = local_gradients(self._student)
        norm = global_norm(pieces, self._device).item()
        lr = self._learning_rate.at(self._steps)
        if accepts(norm):
            clip_by_norm(pieces, norm, self._clip_grad)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._steps += 1
        self._optimizer.zero_grad()
        return {"grad_norm": norm, "lr": lr}

    def hf_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the full student weights as a Hugging Face folder holds them. Collective."""
        return hf_named_parameters(self._student.hf, self._compute_dtype)

    def offload_optimizer(self) -> None:
        """Put the optimizer's state into the host's memory."""
        states = [state for values in self._optimizer.state.values() for state in values.values()]
        self._parking.park(state for state in states if isinstance(state, Tensor))

    def offload(self) -> None:
        """Put model and optimizer into the host's memory."""
        self.offload_optimizer()
        models = [model for model in (self._student, self._reference) if model is not None]
        for model in models:
            reshard(model)
        self._parking.park(parameter for model in models for parameter in model.parameters())

    def onload(self) -> None:
        """Bring all that was put away back."""
        self._parking.unpark()

    def save_checkpoint(self, path: Path) -> None:
        """Write model, optimizer, schedule and generators below `path`. Collective."""
        save_sharded(path, self._student.hf, self._optimizer, self._steps)
        save_random_state(path / RANDOM_FOLDER, self.rank)

    def load_checkpoint(self, path: Path) -> None:
        """Read what `save_checkpoint` wrote, under any number of ranks. Collective."""
        self._steps = load_sharded(path, self._student.hf, self._optimizer)
        load_random_state(
            path / RANDOM_FOLDER, self.rank, self.world_size, seed=self._seed, steps=self._steps
        )

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()
