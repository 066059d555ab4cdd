"""Checkpoints that a run reads and writes, and where its output goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slime.arguments.flags import flag


@dataclass(frozen=True, kw_only=True)
class CheckpointArgs:
    """Model and checkpoints"""

    hf_checkpoint: str = flag(
        help="The student: a Hugging Face folder or hub name; config, tokenizer and weights."
    )
    ref_load: str | None = flag(
        None, help="Weights of the reference for --kl-loss-coef. Default: --hf-checkpoint."
    )
    load: str | None = flag(None, help="Checkpoint folder of an earlier run to go on from.")
    save: str | None = flag(None, help="Folder to write checkpoints to.")
    save_interval: int | None = flag(None, help="Write a checkpoint every so many rollouts.", at_least=1)

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.save_interval is not None and self.save is None:
            yield (
                f"--save-interval {self.save_interval} is set without --save: it does not say where to "
                "write. Add --save FOLDER or drop --save-interval."
            )


@dataclass(frozen=True, kw_only=True)
class OutputArgs:
    """Output"""

    output_dir: str = flag(
        help="Folder of this run's metrics, logs and reports.",
        derive=lambda args: f"outputs/{time.strftime('%Y%m%d-%H%M%S')}",
        derived_from="outputs/<date>-<time>",
    )
    use_wandb: bool = flag(False, help="Log to Weights & Biases; the key comes from WANDB_API_KEY.")
    wandb_project: str = flag("slime", help="Project at Weights & Biases.")
    wandb_group: str | None = flag(None, help="Group at Weights & Biases.")
    wandb_mode: Literal["online", "offline"] = flag(
        "online", help="offline writes to the output folder alone."
    )
    log_level: Literal["debug", "info", "warning", "error"] = flag(
        "info", help="How much the processes tell."
    )

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        yield from ()
