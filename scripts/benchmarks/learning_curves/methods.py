"""What is compared: the cases, the methods as flags of `slime.train`, and the grid of learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from slime.tiny.paths import checkpoint_path

GRID_SEED = 1
"""The seed under which every learning rate is tried; the best one is run under more."""
VOCABULARY = 130
"""Tokens of the tiny models: with so many likeliest ones, the divergences are over the whole distribution."""
GROUP = 4
"""Samples of a prompt, where rewards are compared within a group."""
KL_PROMPTS, KL_SAMPLES, KL_SEED = 128, 2, 7
"""What the final KL is measured on: the same prompts and seeds for every run."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A student to start from, and how long it learns."""

    name: str
    title: str
    checkpoint: str
    """Of `slime.tiny`."""
    learning_rates: tuple[float, ...]
    num_rollout: int
    samples: int
    """Responses of one rollout, which is one optimizer step."""
    eval_interval: int
    warmup: int
    """Optimizer steps of linear warm-up."""
    stop_share: float | None
    """Share of the gap that ends a run once two evaluations in a row have closed it; None: no early end."""


CASES = {
    case.name: case
    for case in (
        Case(
            name="habit",
            title="Student with a bad habit",
            checkpoint="student",
            learning_rates=(1e-4, 3e-4, 1e-3),
            num_rollout=40,
            samples=32,
            eval_interval=2,
            warmup=0,
            stop_share=0.97,
        ),
        Case(
            name="weak",
            title="Weak student",
            checkpoint="weak",
            learning_rates=(1e-3, 2e-3),
            num_rollout=200,
            samples=128,
            eval_interval=10,
            warmup=10,
            stop_share=0.93,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to learn, as flags beside the common ones."""

    name: str
    label: str
    flags: tuple[str, ...]
    teacher_samples: bool = False
    """Whether the responses that are trained on are the teacher's."""
    samples_per_prompt: int = 1
    """More than one where rewards are compared within a group; else fresh prompts teach more."""


DISTIL = ("--use-opd", "--opd-type", "sglang", "--disable-grpo-std-normalization")


def _divergence(name: str, label: str, divergence: str, top_k: int) -> Method:
    flags = ("--opd-loss", "topk", "--opd-divergence", divergence, "--opd-top-k", str(top_k))
    return Method(name=name, label=label, flags=(*DISTIL, *flags))


METHODS = {
    method.name: method
    for method in (
        Method(name="sampled", label="sampled reverse KL", flags=DISTIL),
        _divergence("reverse_kl", "reverse KL, full", "reverse_kl", VOCABULARY),
        _divergence("reverse_kl_top8", "reverse KL, top 8", "reverse_kl", 8),
        _divergence("forward_kl", "forward KL, full", "forward_kl", VOCABULARY),
        _divergence("forward_kl_top8", "forward KL, top 8", "forward_kl", 8),
        _divergence("jsd", "JSD, full", "jsd", VOCABULARY),
        _divergence("jsd_top8", "JSD, top 8", "jsd", 8),
        Method(
            name="hybrid",
            label="sampled reverse KL + task reward",
            flags=(*DISTIL, "--rm-type", "math", "--task-reward-weight", "0.5"),
            samples_per_prompt=GROUP,
        ),
        Method(
            name="sft",
            label="SFT on the teacher's responses",
            flags=("--loss-type", "sft_loss", "--sample-from", "teacher"),
            teacher_samples=True,
        ),
        Method(
            name="grpo",
            label="GRPO, task reward alone",
            flags=("--rm-type", "math"),
            samples_per_prompt=GROUP,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the benchmark."""

    case: Case
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """What the run's folder is called."""
        return f"{self.case.name}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """Return the run as plain data, as JSON gives it back, with the method's flags."""
        case = asdict(self.case) | {"learning_rates": list(self.case.learning_rates)}
        return asdict(self) | {"case": case, "flags": list(METHODS[self.method].flags)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the run of `as_dict`."""
        case = Case(**data["case"] | {"learning_rates": tuple(data["case"]["learning_rates"])})
        return cls(case=case, method=data["method"], learning_rate=data["learning_rate"], seed=data["seed"])


def grid_runs(cases: Sequence[Case], methods: Sequence[str]) -> Iterator[Run]:
    """Yield a run for each learning rate of each case and method, all under `GRID_SEED`."""
    for case in cases:
        for method in methods:
            for learning_rate in case.learning_rates:
                yield Run(case=case, method=method, learning_rate=learning_rate, seed=GRID_SEED)


def train_flags(run: Run, data: Mapping[str, Path], teacher_url: str, output_dir: Path) -> list[str]:
    """Return the command line of a run: that of the main job without a GPU, but for the method's flags."""
    case, group = run.case, METHODS[run.method].samples_per_prompt
    return [
        *_common_flags(case, teacher_url, output_dir),
        *("--prompt-data", str(data["train"]), "--rollout-shuffle", "--seed", str(run.seed)),
        *("--num-rollout", str(case.num_rollout), "--rollout-batch-size", str(case.samples // group)),
        *("--n-samples-per-prompt", str(group), "--advantage-estimator", "grpo"),
        "--calculate-per-token-loss",
        *("--lr", f"{run.learning_rate:g}", "--lr-warmup-iters", str(case.warmup)),
        *("--adam-beta1", "0.9", "--adam-beta2", "0.98", "--train-dtype", "float32", "--train-threads", "1"),
        *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "4096"),
        *("--eval-prompt-data", "test", str(data["test"]), "--eval-interval", str(case.eval_interval)),
        *METHODS[run.method].flags,
    ]


def kl_flags(case: Case, data: Mapping[str, Path], teacher_url: str, output_dir: Path) -> list[str]:
    """Return the command line under which a finished student is held against the teacher on the test split.

    The same for every method: the student samples at temperature 1, the teacher scores.
    """
    return [
        *_common_flags(case, teacher_url, output_dir),
        *("--prompt-data", str(data["test"]), "--seed", str(KL_SEED), "--num-rollout", "1"),
        *("--rollout-batch-size", str(KL_PROMPTS), "--n-samples-per-prompt", str(KL_SAMPLES)),
        *DISTIL,
    ]


def _common_flags(case: Case, teacher_url: str, output_dir: Path) -> list[str]:
    return [
        *("--hf-checkpoint", str(checkpoint_path(case.checkpoint)), "--engine", "transformers"),
        *("--rm-url", f"{teacher_url}/generate", "--output-dir", str(output_dir)),
        *("--input-key", "problem", "--label-key", "answer", "--multimodal-keys", '{"image": "images"}'),
        *("--apply-chat-template", "--rollout-max-response-len", "96", "--rollout-temperature", "1.0"),
    ]
