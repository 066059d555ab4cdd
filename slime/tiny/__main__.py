# ruff: noqa: T201 (a command line prints)
"""Command line of the embedded default.

python -m slime.tiny --data DIR [--set words]                 write the geometry set, or that in words
python -m slime.tiny --measure                                accuracies of the shipped checkpoints
python -m slime.tiny --retrain [--only NAME] [--out DIR]      pre-train the checkpoints anew
"""

import argparse
import sys
import time
from pathlib import Path

from slime.tiny.geometry import GEOMETRY
from slime.tiny.paths import CHECKPOINTS, checkpoint_path, ensure_dataset
from slime.tiny.words import WORDS

SETS = {"geometry": GEOMETRY, "words": WORDS}


def main(argv: list[str] | None = None) -> int:
    """Run what the flags ask for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m slime.tiny", description="Make or measure the embedded data and checkpoints."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--data", metavar="DIR", type=Path, help="write train, validation and test parquet")
    action.add_argument(
        "--measure", action="store_true", help="accuracies of the shipped checkpoints (or --out's)"
    )
    action.add_argument("--retrain", action="store_true", help="pre-train the checkpoints from scratch")
    parser.add_argument("--set", choices=SETS, help="what --data writes: geometry (pictures), or words")
    parser.add_argument("--only", choices=CHECKPOINTS, help="one checkpoint instead of all")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder of checkpoints (with --retrain: tiny_checkpoints)"
    )
    args = parser.parse_args(argv)
    if args.data is not None:
        if args.only is not None or args.out is not None:
            parser.error("--only and --out belong to --retrain and --measure; --data names its folder itself")
        for split, path in ensure_dataset(args.data, SETS[args.set or "geometry"]).items():
            print(f"{split:10}  {path}")
        return 0
    if args.set is not None:
        parser.error("--set belongs to --data; a checkpoint has its own set")
    _checkpoints(args.retrain, [args.only] if args.only else list(CHECKPOINTS), args.out)
    return 0


def _checkpoints(retrain: bool, names: list[str], out: Path | None) -> None:
    import torch

    from slime.tiny.recipe import make_checkpoints, measure

    torch.set_num_threads(1)
    started = time.monotonic()
    if retrain:
        results = make_checkpoints(names, out or Path("tiny_checkpoints"))
    else:
        results = [measure(name, out / name if out else checkpoint_path(name)) for name in names]
    print(f"{'checkpoint':12}  {'validation':>10}  {'test':>6}  {'test, blank pictures':>20}")
    for result in results:
        blank = "no pictures" if result.test_blank is None else f"{result.test_blank:.3f}"
        print(f"{result.name:12}  {result.validation:10.3f}  {result.test:6.3f}  {blank:>20}")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
