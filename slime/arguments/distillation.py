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
    opd_kl_coef: float = flag(1.0, help="Weight of the teacher's stream in the loss.")
    opd_kl_coef_schedule: Literal["constant", "linear", "cosine"] = flag(
        "constant", help="How that weight goes from its first value to --opd-kl-coef-end, over --num-rollout."
    )
    opd_kl_coef_end: float = flag(
        0.0, help="Weight of the teacher's stream at the end of a schedule.", at_least=0
    )
    opd_loss: Literal["sampled", "topk"] = flag(
        "sampled",
        help="sampled: the reverse KL of each sampled token as its advantage; topk: a divergence over the "
        "teacher's --opd-top-k likeliest tokens, the rest in one bucket.",
    )
    opd_divergence: Literal["reverse_kl", "forward_kl", "jsd"] = flag(
        "reverse_kl", help="Divergence of --opd-loss topk."
    )
    opd_jsd_beta: float = flag(
        0.5, help="The teacher's share in the mixture of --opd-divergence jsd.", above=0
    )
    opd_top_k: int = flag(
        help="Ask for the teacher's K likeliest tokens at each response position too; 0: none. From the "
        "vocabulary's size on the divergence is the exact one.",
        derive=lambda args: 64 if args.opd_loss == "topk" else 0,
        derived_from="64 with --opd-loss topk, else 0",
        at_least=0,
    )
    opd_kl_clip: float | None = flag(
        None, help="Cut each token's log pi_S - log pi_T to this size (--opd-loss sampled).", above=0
    )
    opd_kl_discount: float = flag(
        0.0,
        help="Discount of the reverse KL of later tokens in a token's advantage (--opd-loss sampled); 0: "
        "each token answers for itself, 1: for all that follows.",
        at_least=0,
        at_most=1,
    )
    opd_gate: Literal["all", "wrong", "right"] = flag(
        "all",
        help="Which responses are distilled, by the task's grade: wrong, those below 0.5; right, others.",
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
        yield from self._unused()
        if self.opd_teacher_load is not None and self.opd_type != "megatron":
            yield (
                f"--opd-teacher-load {self.opd_teacher_load} goes with --opd-type megatron, where the "
                "trainer holds the teacher. With --opd-type sglang the teacher is a server: name it by "
                "--rm-url and drop --opd-teacher-load."
            )

    def _unused(self) -> Iterator[str]:
        """Yield what would have no effect."""
        if self.opd_loss == "topk" and self.opd_top_k == 0:
            yield "--opd-loss topk learns from the teacher's top-k, and --opd-top-k is 0. Use 64, say."
        if self.opd_jsd_beta >= 1:
            yield f"--opd-jsd-beta is {self.opd_jsd_beta:g}; it must be below 1, or there is no mixture."
        dense = {
            "--opd-divergence": self.opd_divergence != "reverse_kl",
            "--opd-jsd-beta": self.opd_jsd_beta != 0.5 and self.opd_divergence == "jsd",
        }
        sampled = {
            "--opd-kl-clip": self.opd_kl_clip is not None,
            "--opd-kl-discount": self.opd_kl_discount > 0,
        }
        for other, flags in (("topk", dense), ("sampled", sampled)):
            for name in (name for name, given in flags.items() if given and self.opd_loss != other):
                yield (
                    f"{name} has no effect with --opd-loss {self.opd_loss}; it belongs to --opd-loss "
                    f"{other}. Change one of them."
                )
        if self.opd_jsd_beta != 0.5 and self.opd_divergence != "jsd":
            yield (
                f"--opd-jsd-beta {self.opd_jsd_beta:g} has no effect with --opd-divergence "
                f"{self.opd_divergence}. Use --opd-divergence jsd, or drop it."
            )
        if self.opd_kl_coef_end != 0 and self.opd_kl_coef_schedule == "constant":
            yield (
                f"--opd-kl-coef-end {self.opd_kl_coef_end:g} has no effect with a constant weight. Add "
                "--opd-kl-coef-schedule linear or cosine, or drop it."
            )
        if not self.use_opd and (self.opd_loss != "sampled" or self.opd_gate != "all"):
            yield (
                "--opd-loss and --opd-gate have no effect without --use-opd. Add --use-opd --opd-type "
                "sglang, or drop them."
            )
