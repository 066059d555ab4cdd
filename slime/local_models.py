"""The Hugging Face models that a run reads, as folders on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime.arguments import Args


def with_local_models(args: Args) -> Args:
    """Return the arguments with a folder for each model that they name: --hf-checkpoint, --ref-load and
    --opd-teacher-load.

    Raises:
        FileNotFoundError: a model is neither a folder nor, for all that the hub answers, a model there.
    """

    def folder(name: str | None, flag: str) -> str | None:
        return None if name is None else str(local_model(name, flag))

    return replace(
        args,
        hf_checkpoint=str(local_model(args.hf_checkpoint, "--hf-checkpoint")),
        ref_load=folder(args.ref_load, "--ref-load"),
        opd_teacher_load=folder(args.opd_teacher_load, "--opd-teacher-load"),
    )


def local_model(name: str, flag: str) -> Path:
    """Return the folder of the model that `flag` names; a hub name is downloaded, or found in the hub's
    cache.

    Raises:
        FileNotFoundError: neither a folder nor, for all that the hub answers, a model there.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download  # a second to import, and most runs name a folder
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"{flag} {name} is no folder here and no model that the Hugging Face hub gives us ({error}). "
            "Give a folder, or owner/name of a model there."
        ) from error
