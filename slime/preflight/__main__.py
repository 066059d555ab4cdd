"""Ask the machine whether a run can work here. Exit code 0: it can; 1: it cannot; 2: bad use.

python -m slime.preflight [what the launcher knows] -- [the flags of slime.train]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from slime.arguments import parse_args
from slime.preflight.checkpoints import check_checkpoints
from slime.preflight.data import check_data
from slime.preflight.disk import check_disk
from slime.preflight.finding import Finding, report
from slime.preflight.folders import check_folders
from slime.preflight.gpus import check_gpus
from slime.preflight.launch import Download, Launch, Teacher
from slime.preflight.memory import check_memory
from slime.preflight.ports import check_ports
from slime.preflight.tokens import check_tokens
from slime.preflight.versions import check_versions

CHECKS: tuple[Callable[[Launch], Iterable[Finding]], ...] = (
    check_versions,
    check_gpus,
    check_memory,
    check_folders,
    check_disk,
    check_ports,
    check_checkpoints,
    check_tokens,
    check_data,
)


def read_launch(argv: Sequence[str]) -> Launch:
    """Read the command line; a mistake in it exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m slime.preflight",
        usage="%(prog)s [options] -- [flags of slime.train]",
        description="Ask the machine whether a run can work here, before any model is loaded.",
        allow_abbrev=False,
    )
    parser.add_argument("--student-gpus", default="", help="as CUDA_VISIBLE_DEVICES has them; empty: the CPU")
    parser.add_argument("--teacher-path", help="checkpoint of a teacher that is served on this machine")
    parser.add_argument("--teacher-gpus", default="", help="its GPUs")
    parser.add_argument("--teacher-engine", default="sglang", choices=("sglang", "transformers"))
    parser.add_argument("--teacher-port", type=int, default=13141, help="where it is to listen")
    parser.add_argument(
        "--writes",
        action="append",
        nargs=2,
        default=[],
        metavar=("NAME", "FOLDER"),
        help="a folder that is written to, and what names it",
    )
    parser.add_argument(
        "--coming",
        action="append",
        nargs=3,
        default=[],
        metavar=("NAME", "FOLDER", "KIND"),
        help="a model or dataset that is to be downloaded into the folder",
    )
    own, flags = list(argv), []
    if "--" in own:
        place = own.index("--")
        own, flags = own[:place], own[place + 1 :]
    options = parser.parse_args(own)
    teacher = None
    if options.teacher_path is not None:
        teacher = Teacher(
            path=options.teacher_path,
            gpus=_listed(options.teacher_gpus),
            engine=options.teacher_engine,
            port=options.teacher_port,
        )
    return Launch(
        args=parse_args(flags),
        student_gpus=_listed(options.student_gpus),
        teacher=teacher,
        folders={name: Path(folder) for name, folder in options.writes},
        downloads=tuple(Download(name, Path(folder), kind) for name, folder, kind in options.coming),
    )


def _listed(gpus: str) -> tuple[str, ...]:
    return tuple(gpu for gpu in gpus.split(",") if gpu)


def main(argv: Sequence[str] | None = None) -> int:
    """Make all checks, print what they found, and return the exit code."""
    launch = read_launch(sys.argv[1:] if argv is None else argv)
    findings = [finding for check in CHECKS for finding in check(launch)]
    fatal = any(finding.fatal for finding in findings)
    (sys.stderr if fatal else sys.stdout).write(report(findings, len(CHECKS)) + "\n")
    return int(fatal)


if __name__ == "__main__":
    sys.exit(main())
