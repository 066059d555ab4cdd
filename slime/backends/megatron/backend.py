"""`MegatronBackend`: the training verbs on megatron-core's model, schedules and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime.backends.base import Accepts, LossFn, LossInputs, Metrics, ModelTag
from slime.backends.batching import MicroBatch
from slime.backends.megatron.checkpoint import load_masters, load_sharded, save_sharded
from slime.backends.megatron.config import transformer_config
from slime.backends.megatron.export import Exporter
from slime.backends.megatron.held import HeldModel
from slime.backends.megatron.layout import Row, lay_out, lengths_of, row_tokens
from slime.backends.megatron.loading import Checkpoint, load_weights, publishes_experts
from slime.backends.megatron.model import PolicyModel
from slime.backends.megatron.optimizer import Stepper, wrap
from slime.backends.megatron.optimizer_state import OptimizerState
from slime.backends.megatron.parallel import Parallelism, Ranks
from slime.backends.megatron.parameters import Named, mark_shared, named_parameters
from slime.backends.megatron.shape import read_config, require_declared, require_same_tokens, shape_of
from slime.backends.parking import Parking
from slime.backends.randomness import RANDOM_FOLDER, load_random_state, save_random_state
from slime.backends.schedule import LearningRate
from slime.backends.scores import Scores, scores_of

if TYPE_CHECKING:
    from slime.arguments import Args

Step = tuple[MicroBatch, Row]
Use = Callable[[LossInputs, MicroBatch], tuple[Tensor, Any]]
"""(outputs, micro-batch) -> (loss, anything to keep)."""


class MegatronBackend:
    """Implements `TrainBackend`; the process group is up before it is made."""

    def __init__(
        self, args: Args, rank: int, world_size: int, device: torch.device, masked_ids: Sequence[int]
    ) -> None:
        """Load the student, and the reference and the teacher where flags ask for them. Collective.

        Raises:
            ValueError: a model cannot be built, or not under this parallelism.
        """
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._args = args
        self._masked_ids = tuple(masked_ids)
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.precision]
        self._steps = 0
        self._parking = Parking()
        sizes = Parallelism.of(args)
        self._refuse_what_trains_wrongly(sizes)
        with self._machine():
            self._ranks = Ranks(sizes, seed=args.seed, on_cpu=device.type == "cpu")
            # First those that leave the device again, while nothing else is there.
            self._held: dict[ModelTag, HeldModel] = {}
            if args.kl_loss_coef > 0:
                self._hold("reference", args.ref_load or args.hf_checkpoint, self._masked_ids)
            if args.opd_teacher_load is not None:
                # Like a server's, the teacher's scores are over all tokens.
                self._hold("teacher", args.opd_teacher_load, ())
            student, parameters, stored = self._load(args.hf_checkpoint, self._masked_ids)
            if args.freeze_vision_tower and student.vision_model is not None:
                student.vision_model.requires_grad_(False)
            self._student = student
            self._ddp = wrap(args, student)
            self._stepper = Stepper(args, self._ddp, self._dtype)
            self._parameters = parameters
            self._state = OptimizerState(self._stepper, parameters)
            if self._dtype != torch.float32:
                load_masters(stored, Checkpoint(args.hf_checkpoint), self._state)
            self._exporter = Exporter(parameters, student.shape, self._ranks, device)
        student.config.no_sync_func = self._ddp.no_sync
        # Losses are shares of a global mean: nothing is divided by a count of tokens afterwards.
        student.config.finalize_model_grads_func = lambda model, _, **groups: finalize_model_grads(
            model, None, **groups
        )
        self._learning_rate = LearningRate(
            lr=args.lr,
            min_lr=args.min_lr,
            style=args.lr_decay_style,
            warmup_steps=args.lr_warmup_iters,
            total_steps=args.num_rollout * args.samples_per_rollout // args.global_batch_size,
        )

    def _machine(self) -> AbstractContextManager[None]:
        """Return what Megatron's code runs in: on a CPU, calls of CUDA end there."""
        if self._device.type == "cuda":
            return nullcontext()
        from slime.backends.megatron.device_shim import cpu_as_cuda

        return cpu_as_cuda()

    def _refuse_what_trains_wrongly(self, sizes: Parallelism) -> None:
        """Look at the configs of all models before anything is built."""
        args = self._args
        paths = [args.hf_checkpoint, args.ref_load, args.opd_teacher_load]
        configs = {path: read_config(path) for path in paths if path is not None}
        shapes = {path: shape_of(config) for path, config in configs.items()}
        require_declared(args, shapes[args.hf_checkpoint])
        has_experts = any(shape.experts > 0 for shape in shapes.values())
        for path, shape in shapes.items():
            refusals = list(sizes.refusals(shape, has_experts=has_experts))
            if refusals:
                raise ValueError(f"{path}: {' '.join(refusals)}")
            require_same_tokens(args.hf_checkpoint, configs[args.hf_checkpoint], path, configs[path])

    def _hold(self, tag: ModelTag, path: str, masked_ids: Sequence[int]) -> None:
        """Load a model that is only asked. Collective."""
        model, _, _ = self._load(path, masked_ids)
        self._held[tag] = HeldModel(model, self._device)

    def _load(self, path: str, masked_ids: Sequence[int]) -> tuple[PolicyModel, list[Named], list[Named]]:
        """Build a model and fill it from a checkpoint; return with it its parameters as they are exported and
        as this checkpoint has them. Collective."""
        hf_config = read_config(path)
        shape = shape_of(hf_config)
        config = transformer_config(
            self._args, shape, self._ranks.sizes, dtype=self._dtype, device=self._device
        )
        model = PolicyModel(
            config,
            hf_config,
            shape,
            self._ranks,
            self._device,
            chunk_size=self._args.logprob_chunk_size,
            masked_ids=tuple(masked_ids),
        )
        parameters = named_parameters(model, self._ranks)
        mark_shared(parameters)
        checkpoint = Checkpoint(path)
        stored = named_parameters(model, self._ranks, published_experts=publishes_experts(checkpoint, shape))
        load_weights(stored, checkpoint, tied=shape.tied)
        if self._args.gradient_checkpointing and model.vision_model is not None:
            tower: Any = model.vision_model
            tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model, parameters, stored

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
        if not micro_batches:
            return []

        def use(outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, Scores]:
            return outputs.log_probs.new_zeros(()), scores_of(outputs, top_k)

        with self._machine(), self._asked(model) as policy:
            kept = self._run(policy, policy, micro_batches, use, forward_only=True)
        everywhere = self._ranks.from_last_stage(kept)
        assert isinstance(everywhere, list)
        return everywhere

    def _asked(self, model: ModelTag) -> AbstractContextManager[PolicyModel]:
        if model == "student":
            return nullcontext(self._student)
        if model not in self._held:
            flag = {"reference": "--kl-loss-coef above 0", "teacher": "--opd-teacher-load"}[model]
            raise ValueError(f"the {model} model is loaded only with {flag}; set it.")
        return self._held[model].awake()

    def forward_backward(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn) -> Metrics:
        """Accumulate the gradients of all micro-batches; return sums over all ranks, `loss` among them."""

        def use(outputs: LossInputs, batch: MicroBatch) -> tuple[Tensor, Any]:
            loss, sums = loss_fn(outputs, batch)
            return loss, (loss.detach(), dict(sums))

        with self._machine():
            kept = self._run(self._student, self._ddp, micro_batches, use, forward_only=False)
        losses = torch.stack([loss for loss, _ in kept]) if kept else torch.zeros(0, device=self._device)
        return self._add_over_ranks(losses, [sums for _, sums in kept])

    def _run(
        self,
        policy: PolicyModel,
        model: torch.nn.Module,
        micro_batches: Sequence[MicroBatch],
        use: Use,
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Run all micro-batches through the pipeline; return what `use` kept, on the last stage."""

        def step(steps: Iterator[Step], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch, row = next(steps)
            return model(row, batch), partial(finish, row=row, batch=batch)

        def finish(hidden: Tensor, *, row: Row, batch: MicroBatch) -> tuple[Tensor, Tensor, Any]:
            loss, keep = use(policy.outputs(hidden, row, batch), batch)
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), keep

        schedule = get_forward_backward_func()
        return schedule(
            forward_step_func=step,
            data_iterator=self._rows(micro_batches, policy),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=1,  # micro-batches say how long they are
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _rows(self, batches: Sequence[MicroBatch], policy: PolicyModel) -> Iterator[Step]:
        """Lay the micro-batches out, as long on every rank as Megatron's way to the experts needs.

        Each goes to the device when its turn comes, its pictures only where they are looked at.
        """
        config = policy.config
        sharing = self._ranks.sharing
        tokens = [row_tokens(lengths_of(batch), sharing) for batch in batches]
        gathers = config.num_moe_experts is not None and config.moe_token_dispatcher_type == "allgather"
        if gathers and self._ranks.experts.size() > 1:
            tokens = self._ranks.longest(tokens, self._device)

        def steps() -> Iterator[Step]:
            for batch, count in zip(batches, tokens, strict=True):
                row = lay_out(batch, sharing, merge_size=policy.shape.merge_size, tokens=count)
                seen = batch if self._ranks.is_first_stage else replace(batch, pictures=())
                yield seen.to(self._device), row.to(self._device)

        return steps()

    def _add_over_ranks(self, losses: Tensor, sums: Sequence[dict[str, Tensor]]) -> Metrics:
        """Return the totals over micro-batches and data-parallel ranks, which the last stage knows."""
        metrics: object = None
        if self._ranks.is_last_stage:
            totals: dict[str, Tensor] = {"loss": losses.double().sum()}
            for of_batch in sums:
                for name, value in of_batch.items():
                    totals[name] = totals.get(name, 0) + value.double()
            names = sorted(totals)
            values = torch.stack([totals[name] for name in names]).to(self._device)
            dist.all_reduce(values, group=self._ranks.data)
            metrics = dict(zip(names, values.tolist(), strict=True))
        metrics = self._ranks.from_last_stage(metrics)
        assert isinstance(metrics, dict)
        return metrics

    def optim_step(self, accepts: Accepts = math.isfinite) -> Metrics:
        """Clip, step, advance the schedule, zero the gradients; the last alone where the norm is refused."""
        with self._machine():
            norm = self._agreed(self._stepper.gradient_norm())
            lr = self._learning_rate.at(self._steps)
            if accepts(norm):
                self._stepper.step(norm, lr)
                self._steps += 1
            else:
                self._stepper.zero()
        return {"grad_norm": norm, "lr": lr}

    def _agreed(self, norm: float) -> float:
        """Return the norm as the first rank has it: Megatron adds it up in groups, and a last bit could part
        the ranks."""
        value = torch.tensor(norm, dtype=torch.float64, device=self._device)
        dist.broadcast(value, src=0)
        return value.item()

    def hf_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the full student weights as a Hugging Face folder holds them. Collective."""
        return self._exporter.export(self._dtype)

    def offload_optimizer(self) -> None:
        """Put gradients and the optimizer's state into the host's memory."""
        self._parking.park(self._stepper.memory(), but=self._student.parameters())

    def offload(self) -> None:
        """Put model and optimizer into the host's memory."""
        self.offload_optimizer()
        self._parking.park(self._student.parameters())

    def onload(self) -> None:
        """Bring all that was put away back."""
        self._parking.unpark()

    def save_checkpoint(self, path: Path) -> None:
        """Write model, optimizer, schedule and generators below `path`. Collective."""
        save_sharded(path, self._exporter, self._state, self._steps)
        save_random_state(path / RANDOM_FOLDER, self.rank, self._ranks.generators.get_states())

    def load_checkpoint(self, path: Path) -> None:
        """Read what `save_checkpoint` wrote, under any number of ranks. Collective."""
        self._steps = load_sharded(path, self._parameters, self._state)
        trackers = load_random_state(
            path / RANDOM_FOLDER, self.rank, self.world_size, seed=self._args.seed, steps=self._steps
        )
        if trackers:
            self._ranks.generators.set_states(trackers)

    def close(self) -> None:
        """Leave the process group."""
        self._ranks.close()
        dist.destroy_process_group()
