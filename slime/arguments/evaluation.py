"""Accuracy on held-out data, by the task's own rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from slime.arguments.flags import flag
from slime.arguments.reward import rule_name


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs:
    """Evaluation"""

    eval_prompt_data: tuple[str, ...] = flag((), help="Held-out sets: NAME PATH [NAME PATH …].")
    eval_interval: int | None = flag(
        None,
        help="Evaluate after every so many rollouts, beside before the first and after the last.",
        at_least=1,
    )
    eval_rm_type: str = flag(
        "math",
        help="Rule that grades evaluation, math or a dotted path as in --rm-type; never the training plugin.",
        parse=rule_name,
    )
    n_samples_per_eval_prompt: int = flag(1, help="Responses to each evaluation prompt.", at_least=1)
    eval_max_response_len: int = flag(
        help="Longest evaluation response in tokens.",
        derive=lambda args: args.rollout_max_response_len,
        derived_from="--rollout-max-response-len",
        at_least=1,
    )
    eval_temperature: float = flag(0.0, help="Sampling temperature in evaluation; 0 is greedy.", at_least=0)
    eval_teacher: bool = flag(
        False,
        help="Let the teacher answer the evaluation sets once: its server at --rm-url, or engines that serve "
        "--opd-teacher-load for this alone, before the run begins.",
    )
    eval_blank_images: bool = flag(False, help="Diagnosis: evaluate with every picture blank.")
    skip_eval_before_train: bool = flag(False, help="Do not evaluate before the first rollout.")

    @property
    def eval_sets(self) -> tuple[tuple[str, str], ...]:
        """The (name, path) of each evaluation set."""
        return tuple(zip(self.eval_prompt_data[::2], self.eval_prompt_data[1::2], strict=True))

    def validate(self) -> Iterator[str]:
        """Yield what is wrong inside this group."""
        if len(self.eval_prompt_data) % 2:
            yield (
                f"--eval-prompt-data has {len(self.eval_prompt_data)} words; it takes pairs of a name and a "
                "path, as --eval-prompt-data geo3k data/test.parquet."
            )
        names = self.eval_prompt_data[::2]
        if len(set(names)) != len(names):
            yield (
                f"--eval-prompt-data names a set twice ({', '.join(names)}); their metrics would mix. "
                "Rename one."
            )
        if self.eval_interval is not None and not self.eval_prompt_data:
            yield (
                f"--eval-interval {self.eval_interval} is set without --eval-prompt-data: there is nothing "
                "to evaluate on. Add --eval-prompt-data NAME PATH or drop --eval-interval."
            )
        if self.eval_teacher and not self.eval_prompt_data:
            yield (
                "--eval-teacher is set without --eval-prompt-data. Add --eval-prompt-data NAME PATH or drop "
                "it."
            )
        if self.eval_temperature == 0 and self.n_samples_per_eval_prompt > 1:
            yield (
                f"--n-samples-per-eval-prompt {self.n_samples_per_eval_prompt} at --eval-temperature 0 "
                "gives the same greedy answer each time. Use 1, or a temperature above 0."
            )
