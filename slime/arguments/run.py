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
    load: str | None = flag(
        None, help="Go on from here: what an earlier run got as --save, or one of the checkpoints in it."
    )
    save: str | None = flag(None, help="Folder to write checkpoints to.")
    save_interval: int | None = flag(
        None, help="Write a checkpoint every so many rollouts, beside the one after the last.", at_least=1
    )
    save_keep: int = flag(2, help="Keep so many of the newest checkpoints; 0: all.", at_least=0)
    save_hf_interval: int | None = flag(
        None,
        help="Write the student as a Hugging Face folder, --save/hf/rollout-000010, every so many rollouts "
        "and after the last; 0: after the last alone. None of them is removed.",
        at_least=0,
    )

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        for name, interval in (
            ("--save-interval", self.save_interval),
            ("--save-hf-interval", self.save_hf_interval),
        ):
            if interval is not None and self.save is None:
                yield (
                    f"{name} {interval} is set without --save: it does not say where to write. Add --save "
                    f"FOLDER or drop {name}."
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
