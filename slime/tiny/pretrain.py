"""Pre-trains one tiny model from scratch on a stream of generated problems.

Supervised next-token training on written solutions. Learning is a phase transition (an accuracy of 0.02
becomes 0.6 within a hundred steps), so the weights that are returned are chosen by greedy validation
accuracy.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from slime.tiny.accuracy import greedy_accuracy
from slime.tiny.examples import Encoder
from slime.tiny.geometry import GEOMETRY
from slime.tiny.kinds import solve
from slime.tiny.model import TinyModel, build_model
from slime.tiny.problems import Problem, ProblemSet
from slime.tiny.slips import Segment, response_with_slip


@dataclass(frozen=True, slots=True)
class Settings:
    """How one checkpoint is made."""

    seed: int
    steps: int
    problems: ProblemSet = GEOMETRY
    """What it is trained on; a set with pictures makes a model that sees."""
    learning_rate: float = 2e-3
    """The peak; reached after `warmup` steps, then a cosine to zero."""
    warmup: int = 50
    batch_size: int = 32
    weight_decay: float = 0.01
    forgetful: float = 0.0
    """Share of the solutions that leave out the last step."""
    forgetful_from: int = 0
    """The first step with such solutions: what is forgotten has been learned before."""
    slips: float = 0.0
    """Share of the solutions with a slip that is not learned."""
    stop_within: tuple[float, float] | None = None
    """Stop at the first check whose validation accuracy lies in this range; None runs all steps."""
    check_every: int = 100


def pretrain(
    settings: Settings,
    encoder: Encoder,
    held_out: Sequence[Problem],
    validation: Sequence[Problem],
    name: str,
) -> TinyModel:
    """Train a model; RuntimeError when no check met `stop_within`.

    No picture or question of `held_out` is trained on. Without `stop_within` the weights of the best check
    are returned, the latest of equals; of a forgetful model the last, since its accuracy falls as its habit
    settles.
    """
    model = build_model(settings.seed, sees=settings.problems.pictured)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, settings))
    stream = _written_solutions(settings, {problem.key for problem in held_out})
    best, best_state = -1.0, dict[str, Tensor]()
    with tqdm(total=settings.steps, desc=name, unit="step") as bar:
        for step in range(1, settings.steps + 1):
            loss = _train_step(model, optimizer, encoder, [next(stream) for _ in range(settings.batch_size)])
            schedule.step()
            bar.update()
            if step % settings.check_every and step != settings.steps:
                continue
            accuracy = greedy_accuracy(model.eval(), encoder, validation)
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
            if settings.stop_within is not None:
                if settings.stop_within[0] <= accuracy <= settings.stop_within[1]:
                    return model
            elif accuracy >= best or settings.forgetful:
                best, best_state = accuracy, {key: value.clone() for key, value in model.state_dict().items()}
    if settings.stop_within is not None:
        raise RuntimeError(
            f"no check of {name} had a validation accuracy within {settings.stop_within} in {settings.steps} "
            "steps: check more often, or take another seed"
        )
    model.load_state_dict(best_state)
    return model


def _train_step(
    model: TinyModel,
    optimizer: torch.optim.Optimizer,
    encoder: Encoder,
    rows: Sequence[tuple[Problem, list[Segment]]],
) -> float:
    """Take one optimizer step on problems with their solutions; return the loss."""
    problems, solutions = zip(*rows, strict=True)
    images = [problem.image for problem in problems if problem.image is not None]
    batch = encoder.examples([problem.text for problem in problems], images, solutions)
    loss = model.train()(**batch.inputs, labels=batch.labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _cosine(step: int, settings: Settings) -> float:
    """Return the factor on the learning rate."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _written_solutions(settings: Settings, held_out: set[str]) -> Iterator[tuple[Problem, list[Segment]]]:
    """Yield problems whose keys are not held out, each with a solution as the settings want it."""
    rng = random.Random(settings.seed)
    learned_before = settings.forgetful_from * settings.batch_size
    for row, problem in enumerate(settings.problems.stream(rng, set(held_out))):
        forget, slip = rng.random() < settings.forgetful, rng.random() < settings.slips
        forget = forget and row >= learned_before
        if slip:
            response = response_with_slip(rng, problem)
        else:
            solution = solve(problem.kind, problem.a, problem.b, forget_last_step=forget)
            response = [Segment(solution, True)]
        yield problem, response
