"""May the run write where it has to?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slime.arguments.recording import recording_template
from slime.preflight.disk import nearest
from slime.preflight.finding import Finding
from slime.preflight.launch import Launch

CHECK = "folders"


def check_folders(launch: Launch) -> Iterator[Finding]:
    """Write a file into each folder, or into what there is of the way to it, and remove it again."""
    args = launch.args
    folders = {"--output-dir": Path(args.output_dir), "TMPDIR": Path(os.environ.get("TMPDIR", "/tmp"))}
    folders |= launch.folders
    if args.save is not None:
        folders["--save"] = Path(args.save)
    if args.save_debug_rollout_data is not None:
        folders["--save-debug-rollout-data"] = Path(recording_template(args.save_debug_rollout_data)).parent
    by_place: dict[Path, list[str]] = {}
    for name, folder in folders.items():
        by_place.setdefault(nearest(folder), []).append(name)
    for place, names in by_place.items():
        problem = write_problem(place)
        if problem is not None:
            first, named = folders[names[0]], ", ".join(names)
            yield Finding(
                check=CHECK,
                what=f"nothing can be written to {first} ({named}): {problem}",
                remedy=f"let this user write there, or name another folder by {named}",
            )


def write_problem(place: Path) -> str | None:
    """Say why no file can be made in a folder that is there; None where it can."""
    if not place.is_dir():
        return f"{place} is a file"
    try:
        descriptor, name = tempfile.mkstemp(prefix=".slime-preflight-", dir=place)
        os.close(descriptor)
        os.unlink(name)
    except OSError as error:
        return str(error)
    return None
