"""What the ids of two tokenizers mean, held against each other. Reads no tokenizer itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime.engines.doctor.outcome import Fault


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of a tokenizer."""

    ids: Mapping[int, str]
    special: Mapping[int, str]
    """Those that were added to the vocabulary, for what they stand for."""
    end: int | None
    """The end of a turn."""


def compare_tokens(student: Tokens, teacher: Tokens, vocab_size: int) -> None:
    """Hold the student's tokens against the teacher's, whose model has `vocab_size` ids; special ones first.

    Raises:
        Fault: an id means another token, or is beyond the teacher's embedding.
    """
    highest = max(student.ids, default=-1)
    if highest >= vocab_size:
        raise Fault(
            "vocabulary-small",
            f"the student's tokenizer has ids up to {highest} and the teacher's model has {vocab_size}",
            "distil from a teacher with the student's vocabulary",
        )
    if student.end != teacher.end:
        raise Fault(
            "special-tokens-differ",
            f"the end of turn is {student.end} for the student and {teacher.end} for the teacher",
            "use checkpoints of one family (Thinking with Thinking, Instruct with Instruct)",
        )
    special = _differing(student.special, teacher.special)
    if special:
        raise Fault(
            "special-tokens-differ",
            f"{len(special)} special ids differ: {_shown(special)}",
            "distil from a teacher with the student's special tokens",
        )
    ordinary = _differing(student.ids, teacher.ids)
    if ordinary:
        raise Fault(
            "vocabulary-differs",
            f"{len(ordinary)} of {len(student.ids)} ids are other tokens: {_shown(ordinary)}",
            "distil from a teacher with the student's vocabulary",
        )


def _differing(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[tuple[int, str, str | None]]:
    """Return (id, student's token, teacher's token) where they differ."""
    return [(id_, token, theirs.get(id_)) for id_, token in sorted(ours.items()) if theirs.get(id_) != token]


def _shown(differing: list[tuple[int, str, str | None]]) -> str:
    shown = [
        f"{id_} is {ours!r} for the student and {theirs!r} for the teacher" for id_, ours, theirs in differing
    ]
    return "; ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")
