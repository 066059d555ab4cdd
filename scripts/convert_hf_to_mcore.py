"""Makes a checkpoint of a Hugging Face folder, as --train-backend megatron saves and loads it:

    python scripts/convert_hf_to_mcore.py --hf-checkpoint MODEL --save FOLDER

`--load FOLDER` then begins with these weights, at rollout 0, under any parallelism. A run does not need it:
with `--hf-checkpoint MODEL` every rank reads its slices of the folder itself. It is for weights of another
origin than the folder that gives a run its config and tokenizer. No GPU and no process group is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from slime.backends.megatron.checkpoint import write_steps, write_tensors
from slime.backends.megatron.loading import Checkpoint, publishes_experts
from slime.backends.megatron.shape import read_config, shape_of
from slime.checkpoints import Maker, RunState, begin_checkpoint, finish_checkpoint, model_of

TRAINER_FOLDER = "trainer"
MASTER_FOLDER = "master"
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-checkpoint", type=Path, required=True, help="the model's folder")
    parser.add_argument("--save", type=Path, required=True, help="folder of checkpoints to write into")
    args = parser.parse_args(argv)
    partial = begin_checkpoint(args.save, 0)
    master = partial / TRAINER_FOLDER / MASTER_FOLDER
    master.mkdir(parents=True)
    write_tensors(master, weights(args.hf_checkpoint))
    write_steps(partial / TRAINER_FOLDER, 0)
    maker = Maker(train_backend="megatron", num_train_ranks=1, model=model_of(args.hf_checkpoint))
    path = finish_checkpoint(partial, RunState(), maker)
    sys.stdout.write(f"{args.hf_checkpoint} -> {path}\n")


def weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights one by one, float32, in the published layout.

    Raises:
        FileNotFoundError: the folder has none.
    """
    checkpoint = Checkpoint(folder)
    published = publishes_experts(checkpoint, shape_of(read_config(str(folder))))
    for name in sorted(checkpoint.names):
        tensor = checkpoint.whole(name).float()
        yield name, tensor if published or not name.endswith(FUSED_EXPERTS) else tensor.transpose(1, 2)


if __name__ == "__main__":
    main()
