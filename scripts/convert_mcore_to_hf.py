"""Makes a Hugging Face folder of a checkpoint that --train-backend megatron saved:

    python scripts/convert_mcore_to_hf.py --load outputs/RUN/checkpoints --hf-checkpoint MODEL --save FOLDER

MODEL is the folder that the run began with; its config, tokenizer and processor go along. No GPU, no Megatron
and no process group is needed: the checkpoint has the names and shapes of the model's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from slime.checkpoints import find_checkpoint
from slime.weight_sync.disk import write_weights

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WEIGHTS = Path("trainer") / "master"


def weights(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained weights one by one, in `dtype`.

    Raises:
        FileNotFoundError: the folder has none.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors file: --load names no checkpoint that --train-backend megatron "
            "saved."
        )
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name).to(dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, required=True, help="the run's --save, or a folder below it")
    parser.add_argument("--hf-checkpoint", type=Path, required=True, help="the folder that it began with")
    parser.add_argument("--save", type=Path, required=True, help="the folder to make; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="precision of the weights")
    args = parser.parse_args(argv)
    checkpoint, note = find_checkpoint(args.load)
    if note is not None:
        sys.stdout.write(note + "\n")
    size = write_weights(
        weights(checkpoint / WEIGHTS, DTYPES[args.dtype]),
        args.save,
        checkpoint=args.hf_checkpoint,
        writes=True,
    )
    sys.stdout.write(f"{checkpoint} -> {args.save}: {size / 1e6:,.1f} MB\n")


if __name__ == "__main__":
    main()
