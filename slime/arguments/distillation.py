"""On-policy distillation: what is learned from the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slime.arguments.flags import flag


@dataclass(frozen=True, kw_only=True)
class DistillationArgs:
    """Distillation"""

    use_opd: bool = flag(False, help="Distil the teacher on the student's own responses.")
    opd_type: Literal["sglang", "megatron"] | None = flag(
        None, help="Where the teacher lives: sglang, a server at --rm-url; megatron, in the trainer."
    )
    opd_kl_coef: float = flag(1.0, help="Weight of the reverse KL to the teacher.")
    opd_top_k: int = flag(
        0, help="Ask for the teacher's K likeliest tokens at each response position too; 0: none.", at_least=0
    )
    opd_misaligned: Literal["abort", "mask"] = flag(
        "abort",
        help=(
            "What to do about a score that does not belong to the sampled tokens. abort: end the run; mask: "
            "leave the sample out of the loss and count it."
        ),
    )
    opd_max_failed_frac: float = flag(
        0.1,
        help="Share of a rollout's samples that may stay without a score (masked and counted); beyond it "
        "the run ends.",
        at_least=0,
        at_most=1,
    )
    opd_teacher_load: str | None = flag(None, help="Checkpoint of the teacher, with --opd-type megatron.")

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if self.use_opd and self.opd_type is None:
            yield (
                "--use-opd is set without --opd-type: it does not say where the teacher lives. "
                "Add --opd-type sglang (a server at --rm-url)."
            )
        if self.opd_type is not None and not self.use_opd:
            yield (
                f"--opd-type {self.opd_type} is set without --use-opd: nothing would be distilled. Add "
                "--use-opd or drop it."
            )
        if self.use_opd and self.opd_kl_coef <= 0:
            yield (
                f"--opd-kl-coef is {self.opd_kl_coef:g} with --use-opd: "
                + (
                    "nothing would be distilled."
                    if self.opd_kl_coef == 0
                    else "the student would flee the teacher."
                )
                + " Set a positive coefficient or drop --use-opd."
            )
        if not self.use_opd and self.opd_kl_coef != 1.0:
            yield (
                f"--opd-kl-coef {self.opd_kl_coef:g} has no effect without --use-opd. Add --use-opd "
                "--opd-type sglang or drop it."
            )
        if self.opd_teacher_load is not None and self.opd_type != "megatron":
            yield (
                f"--opd-teacher-load {self.opd_teacher_load} goes with --opd-type megatron, where the "
                "trainer holds the teacher. With --opd-type sglang the teacher is a server: name it by "
                "--rm-url and drop --opd-teacher-load."
            )
