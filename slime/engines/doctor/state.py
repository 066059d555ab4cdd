"""What the checks of one teacher share: the server, the probes, and what earlier checks have found out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slime.engines.doctor.files import CheckpointFiles
from slime.engines.doctor.material import Material, Picture
from slime.engines.doctor.outcome import Fault
from slime.engines.doctor.receipt import Probe, Scores, read_scores
from slime.engines.doctor.teacher import Teacher

LEAST_TOLERANCE = 0.05
LARGEST_TOLERANCE = 0.3


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    timeout: float = 30.0
    """Seconds that one request may take."""
    max_tokens: int | None = None
    """The longest prompt and response, together, of the run that is to come."""
    deadline: float = 60.0
    """Seconds after which no further check is begun."""
    samples: int = 256
    """Samples of one rollout."""
    text_only: bool = False
    """No prompt of the run has a picture."""
    teacher_path: str | None = None
    """Where the teacher's checkpoint lies here, if not where the server says."""
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass
class State:
    """Filled by the checks, in their order."""

    teacher: Teacher
    options: Options
    material: Material | None
    """Of the student; without a student of the teacher's own checkpoint, once it is known."""
    with_student: bool
    model_info: dict[str, Any] = field(default_factory=dict)
    server_info: dict[str, Any] = field(default_factory=dict)
    context: int | None = None
    """Tokens that the server says it takes."""
    files: CheckpointFiles | None = None
    """The teacher's checkpoint, where it can be read here."""
    known_ids: int = 0
    """Ids below this are in the teacher's vocabulary; higher ones can bring a server down."""
    pictures: bool = False
    """Whether teacher and student see, and the run has pictures."""
    picture: Picture | None = None
    cold: Scores | None = None
    """Of the base probe, the first time."""
    noise: tuple[float, float] = (0.0, 0.0)
    """Mean and largest difference between scores that should be equal."""
    samples: list[tuple[Probe, list[float]]] = field(default_factory=list)
    """Responses that the teacher sampled, and its scores of them."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Round trips, by name."""

    @property
    def own(self) -> Material:
        """The material, which every check after `model` has."""
        assert self.material is not None
        return self.material

    @property
    def why_no_pictures(self) -> str:
        """Why the checks of pictures are left out."""
        if self.options.text_only:
            return "no pictures: --text-only"
        return f"no pictures: the {'teacher' if self.own.sees else 'student'} has no vision"

    @property
    def vocab_size(self) -> int:
        """The teacher's, or the student's where the teacher's is not known."""
        return self.files.facts.vocab_size if self.files else self.own.facts.vocab_size

    @property
    def tolerance(self) -> float:
        """Largest mean difference that passes for rounding."""
        return min(max(LEAST_TOLERANCE, 5 * self.noise[0]), LARGEST_TOLERANCE)

    def probe(self, pictures: Sequence[Picture], response: Sequence[int] | None = None) -> Probe:
        """Return the probe conversation, with the usual response where none is given."""
        response = self.own.response(self.known_ids) if response is None else response
        return self.own.probe(pictures, response, self.vocab_size)

    def base(self, response: Sequence[int] | None = None) -> Probe:
        """Return the probe that most checks use: with a picture where there are any."""
        return self.probe([self.picture] if self.picture else [], response)

    async def score(self, probe: Probe, start: int | None = None, temperature: float | None = None) -> Scores:
        """Ask for scores and check their receipt.

        Raises:
            Fault: no answer, or not the one that was asked for.
        """
        try:
            answer = await self.teacher.ask(probe.payload(start, temperature))
        except Fault as fault:
            if fault.name != "truncated" or not probe.images or start == 0:
                raise
            # Without its picture the sequence ends before the start that was asked for, which is refused.
            # From 0 on it is answered, and the counts tell what became of the picture.
            await self.score(probe, start=0)
            raise
        return read_scores(answer, probe, start)


def difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return mean and largest absolute difference of two rows of log-probs."""
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return (sum(gaps) / len(gaps), max(gaps)) if gaps else (0.0, 0.0)
