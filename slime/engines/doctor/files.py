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
from slime.engines.doctor.tokens import Tokens, compare_tokens
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
    compare_tokens(tokens_of(material.tokenizer), tokens_of(teacher.tokenizer), teacher.facts.vocab_size)


def tokens_of(tokenizer: Any) -> Tokens:
    """Return what the ids of a tokenizer of transformers mean."""
    return Tokens(
        ids={id_: token for token, id_ in tokenizer.get_vocab().items()},
        special={id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()},
        end=tokenizer.eos_token_id,
    )


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
