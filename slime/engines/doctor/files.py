"""The teacher's checkpoint files beside the student's: what tokens, templates and pictures must share.

Reads folders and the local hub cache, downloads nothing, and never asks the server.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from slime.engines.doctor.material import Material, render
from slime.engines.doctor.outcome import Fault, Finding
from slime.engines.model_facts import ModelFacts, model_facts
from slime.utils.processing_utils import load_processor

SAMPLE_BYTES = 2**20
IMAGE_FIELDS = (
    "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "do_rescale",
    "rescale_factor", "do_normalize", "do_resize",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint that can be read here."""

    path: str
    facts: ModelFacts
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer


def read_checkpoint(path: str) -> CheckpointFiles | None:
    """Load a folder or a hub name that is in the local cache; None where it cannot be read here."""
    try:
        processor = load_processor(path, local_files_only=True)
        return CheckpointFiles(path, model_facts(path), processor)
    except (OSError, ValueError, KeyError):
        return None


def compare_vocabularies(material: Material, teacher: CheckpointFiles) -> None:
    """Hold the student's tokens against the teacher's, special ones first.

    Raises:
        Fault: an id means another token, or is beyond the teacher's embedding.
    """
    highest = len(material.tokenizer) - 1
    if highest >= teacher.facts.vocab_size:
        raise Fault(
            "vocabulary-small",
            f"the student's tokenizer has ids up to {highest} and the teacher's model has "
            f"{teacher.facts.vocab_size}",
            "distil from a teacher with the student's vocabulary",
        )
    ours, theirs = material.tokenizer.eos_token_id, teacher.tokenizer.eos_token_id
    if ours != theirs:
        raise Fault(
            "special-tokens-differ",
            f"the end of turn is {ours} for the student and {theirs} for the teacher",
            "use checkpoints of one family (Thinking with Thinking, Instruct with Instruct)",
        )
    special = _differing(_special(material.tokenizer), _special(teacher.tokenizer))
    if special:
        raise Fault(
            "special-tokens-differ",
            f"{len(special)} special ids differ: {_shown(special)}",
            "distil from a teacher with the student's special tokens",
        )
    tokens = _tokens(material.tokenizer)
    ordinary = _differing(tokens, _tokens(teacher.tokenizer))
    if ordinary:
        raise Fault(
            "vocabulary-differs",
            f"{len(ordinary)} of {len(tokens)} ids are other tokens: {_shown(ordinary)}",
            "distil from a teacher with the student's vocabulary",
        )


def _special(tokenizer: Any) -> dict[int, str]:
    return {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}


def _tokens(tokenizer: Any) -> dict[int, str]:
    return {id_: token for token, id_ in tokenizer.get_vocab().items()}


def _differing(ours: dict[int, str], theirs: dict[int, str]) -> list[tuple[int, str, str | None]]:
    """Return (id, student's token, teacher's token) where they differ."""
    return [(id_, token, theirs.get(id_)) for id_, token in sorted(ours.items()) if theirs.get(id_) != token]


def _shown(differing: list[tuple[int, str, str | None]]) -> str:
    shown = [
        f"{id_} is {ours!r} for the student and {theirs!r} for the teacher" for id_, ours, theirs in differing
    ]
    return "; ".join(shown[:3]) + (" ..." if len(shown) > 3 else "")


def compare_templates(material: Material, teacher: CheckpointFiles) -> Finding:
    """Render the probe conversation with both templates.

    Raises:
        Fault: they write it differently.
    """
    ours, theirs = material.processor.chat_template, teacher.processor.chat_template
    pictures = int(material.sees and teacher.processor.image_processor is not None)
    student, other = material.render(pictures), render(teacher.processor, pictures)
    if student != other:
        raise Fault(
            "template-differs",
            f"the student's template ends {student[-60:]!r} and the teacher's {other[-60:]!r}",
            "the teacher would read prompts in a form that is new to it; use checkpoints of one kind; "
            "--allow chat-template if that is meant",
        )
    if ours != theirs:
        return Finding(
            "the templates differ and write the probe alike",
            warning="template-differs-elsewhere",
            remedy="compare both chat_template.jinja where the data use system prompts, tools or many turns",
        )
    return Finding("both write the probe alike" if ours else "neither checkpoint has one")


def compare_image_processors(material: Material, teacher: CheckpointFiles) -> Finding:
    """Hold the settings that make pixels and grids against each other; sizes within the run's limits.

    Raises:
        Fault: the teacher would see other pixels or another grid than the student.
    """
    ours, theirs = material.processor.image_processor, teacher.processor.image_processor
    differing = [
        f"{name} is {_setting(ours, name)} for the student and {_setting(theirs, name)} for the teacher"
        for name in IMAGE_FIELDS
        if _setting(ours, name) != _setting(theirs, name)
    ]
    if differing:
        raise Fault(
            "processor-differs",
            "; ".join(differing),
            "give both checkpoints the same preprocessor_config.json",
        )
    low, high = theirs.size["shortest_edge"], theirs.size["longest_edge"]
    if material.low < low or material.high > high:
        raise Fault(
            "processor-differs",
            f"the run's pictures have {material.low} to {material.high} pixels and the teacher leaves {low} "
            f"to {high} alone: it would resize the others",
            f"set --image-min-pixels {max(low, material.low)} --image-max-pixels {min(high, material.high)}",
        )
    return Finding(
        f"patch {ours.patch_size}, merge {ours.merge_size}, mean and std as the student's; "
        f"{material.low} to {material.high} pixels are left alone"
    )


def _setting(processor: Any, name: str) -> Any:
    value = processor.to_dict().get(name)
    return list(value) if isinstance(value, tuple) else value


# ---- weights ----


def weight_files(checkpoint: str) -> list[Path]:
    """Return a checkpoint's safetensors files, where they lie here; none where they do not."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        try:
            config = cached_file(checkpoint, "config.json", local_files_only=True)
        except (OSError, ValueError):
            return []
        folder = Path(str(config)).parent
    return sorted(folder.glob("*.safetensors"))


def fingerprint(files: list[Path]) -> str:
    """Hash sizes, beginnings, middles and ends of weight files: enough to tell checkpoints apart."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                file.seek(place)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
