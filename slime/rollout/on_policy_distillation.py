"""The teacher's part of on-policy distillation: score the very tokens that the student sampled.

`reward_func` asks the server at `--rm-url` and checks that it scored these tokens; `post_process_rewards`
writes `sample.teacher_log_probs`. Both have slime's plugin signatures. With `engines/` beside it this file
needs nothing of slime but a `Sample` and a flat `args`. It trains nothing and grades nothing. Shape letters:
R response tokens, P prompt tokens (expanded: a picture counts `grid.prod() // merge²`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from slime.engines.api import collapse_image_pads, score_payload
from slime.engines.client import EngineClient
from slime.engines.errors import (
    AnswerError,
    EngineAbortedError,
    MissingScoreError,
    PictureMismatchError,
    ScoreMismatchError,
    ShortScoresError,
)
from slime.engines.model_facts import ModelFacts, model_facts
from slime.engines.pictures import data_uris
from slime.engines.scores import TopScores, score_triples, top_scores
from slime.utils.types import Sample

REMEDY = "Is the teacher running? See its log (teacher*.log in its output folder) and check --rm-url."


class TeacherArgs(Protocol):
    """What is read of the arguments in slime and here alike; `teacher_settings` reads the rest."""

    @property
    def rm_url(self) -> str | None: ...
    @property
    def reward_key(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Teacher:
    """One teacher: the servers of one model."""

    name: str | None
    """What a sample's metadata calls it; None where there is one teacher alone."""
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """Who scores, and how it is asked."""

    teachers: tuple[Teacher, ...]
    key: str
    """Entry of a sample's metadata that names its teacher, where they have names."""
    concurrency: int
    timeout: float
    patience: float
    top_k: int
    facts: ModelFacts | None
    """Of the student's checkpoint, whose vocabulary the teacher shares; None where `args` names none."""

    def teacher_of(self, sample: Sample) -> Teacher:
        """Return the sample's own teacher.

        Raises:
            ValueError: its metadata names none that there is.
        """
        if self.teachers[0].name is None:
            return self.teachers[0]
        name = sample.metadata.get(self.key)
        for teacher in self.teachers:
            if teacher.name == name:
                return teacher
        raise ValueError(
            f"sample {sample.index} has {self.key} = {name!r} in its metadata, and --opd-teachers names "
            f"{', '.join(str(teacher.name) for teacher in self.teachers)}. Name a teacher for it, or choose "
            "the entry that names one by --opd-teacher-key."
        )


def teacher_settings(args: TeacherArgs) -> TeacherSettings:
    """Read the settings. The one place that allows for flags that upstream slime does not have."""

    def flag(name: str, absent: Any) -> Any:
        return getattr(args, name) if hasattr(args, name) else absent

    named: dict[str, tuple[str, ...]] = flag("named_teachers", {})
    urls = tuple(flag("rm_urls", ())) or ((args.rm_url,) if args.rm_url else ())
    if not urls and not named:
        raise ValueError(
            "no --rm-url is given; name the teacher's server, as http://127.0.0.1:13141/generate."
        )
    checkpoint = flag("hf_checkpoint", None)
    facts = model_facts(checkpoint) if checkpoint else None
    top_k = flag("opd_top_k", 0)
    return TeacherSettings(
        teachers=tuple(Teacher(name, own) for name, own in named.items()) or (Teacher(None, urls),),
        key=flag("opd_teacher_key", ""),
        concurrency=flag("teacher_concurrency", 256),
        timeout=flag("teacher_timeout", 120.0),
        patience=flag("teacher_patience", 60.0),
        top_k=min(top_k, facts.vocab_size) if facts else top_k,
        facts=facts,
    )


_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Teacher, EngineClient]] = WeakKeyDictionary()
"""A plugin is a bare function: its connection pools live as long as the event loop that it is called in."""


def teacher_client(settings: TeacherSettings, teacher: Teacher) -> EngineClient:
    """Return the running loop's client of this teacher."""
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    if teacher not in clients:
        clients[teacher] = EngineClient(
            teacher.urls,
            role="teacher" if teacher.name is None else f"teacher {teacher.name}",
            remedy=REMEDY,
            concurrency=settings.concurrency,
            timeout=settings.timeout,
            patience=settings.patience,
        )
    return clients[teacher]


async def close_teacher_clients() -> None:
    """Close the running loop's connections to teachers."""
    for client in _clients.pop(asyncio.get_running_loop(), {}).values():
        await client.close()


async def reward_func(args: TeacherArgs, sample: Sample, **kwargs: Any) -> dict[str, Any]:
    """Score one response under the teacher at `--rm-url`, pictures included."""
    return await score_response(args, sample)


def post_process_rewards(
    args: TeacherArgs, samples: list[Sample], **kwargs: Any
) -> tuple[list[float], list[float]]:
    """Attach the teacher's scores to each sample; return (raw rewards, rewards), all zero.

    Pure distillation has no reward: the teacher's scores are a stream of their own in the trainer.
    """
    for sample in samples:
        attach_scores(args, sample)
    return [0.0] * len(samples), [0.0] * len(samples)


async def score_response(args: TeacherArgs, sample: Sample) -> dict[str, Any]:
    """Return the teacher's scores of a response: the last R + 1 triples, the first a placeholder.

    The answer's form is the server's own, `{"meta_info": {"input_token_logprobs": [...]}}`, with only what is
    read. With `--opd-top-k` its `top_scores` holds the distributions (`TopScores`).

    Raises:
        EngineError: the teacher cannot be reached, refuses, or scored something else than the sampled tokens.
        ValueError: there is no teacher for this sample.
    """
    settings = teacher_settings(args)
    if sample.response_length == 0:
        return {"meta_info": _no_scores(sample, settings)}
    teacher = settings.teacher_of(sample)
    client = teacher_client(settings, teacher)
    images = await data_uris(_images(sample))
    async with client.turn():
        request = _request(sample, settings.facts)
        payload = _payload(sample, request, images, settings)

    def read(answer: Any) -> dict[str, Any]:
        return {"meta_info": _scores(answer, sample, request, settings)}

    try:
        return await client.score(payload, group=sample.group_index, reader=read)
    except (AnswerError, EngineAbortedError, ScoreMismatchError) as error:
        url = client.endpoint_for(sample.group_index).generate_url
        raise type(error)(f"sample {sample.index}, scored by the {client.role} at {url}: {error}") from error


def _payload(
    sample: Sample, request: _Request, images: Sequence[str], settings: TeacherSettings
) -> dict[str, Any]:
    """Return the body that is posted, which holds a picture for each pad."""
    if request.image_pads is not None and request.image_pads != len(images):
        raise PictureMismatchError(
            f"sample {sample.index} has {len(images)} pictures and its prompt {request.image_pads} image "
            "pads; the teacher would see other pictures than the student."
        )
    return score_payload(request.tokens, request.prompt_length - 1, images, top_k=settings.top_k)


def _no_scores(sample: Sample, settings: TeacherSettings) -> dict[str, Any]:
    """Return the scores of an empty response, for which nobody is asked."""
    kept: dict[str, Any] = {"input_token_logprobs": [[None, sample.tokens[-1], None]]}
    if settings.top_k > 0:
        kept["top_scores"] = TopScores.empty(settings.top_k)
    return kept


def _scores(answer: Any, sample: Sample, request: _Request, settings: TeacherSettings) -> dict[str, Any]:
    """Return what is kept of an answer, after the receipt of its tokens."""
    vocab_size = settings.facts.vocab_size if settings.facts else None
    triples = score_triples(
        answer,
        sample.tokens[len(sample.tokens) - sample.response_length :],
        vocab_size=vocab_size,
        prompt_tokens=request.prompt_length + sample.response_length if request.exact else None,
        image_tokens=request.image_tokens if request.exact else None,
    )
    kept: dict[str, Any] = {"input_token_logprobs": triples}
    if settings.top_k > 0:
        kept["top_scores"] = top_scores(answer, triples, settings.top_k, vocab_size=vocab_size)
    return kept


def attach_scores(args: TeacherArgs, sample: Sample) -> None:
    """Write what `score_response` (or a server) returned onto the sample: `teacher_log_probs`, and the top-k
    where it was asked for.

    Raises:
        ScoreMismatchError: there are fewer than R scores, or one of them is null.
    """
    answer = sample.get_reward_value(args)
    sample.teacher_log_probs = teacher_log_probs(answer, sample.response_length)
    top: TopScores | None = answer["meta_info"].get("top_scores")
    if top is not None:
        sample.teacher_top_ids = torch.from_numpy(top.ids)
        sample.teacher_top_log_probs = torch.from_numpy(top.log_probs)
        sample.teacher_tail_mass = torch.from_numpy(top.tail_mass)


def teacher_log_probs(answer: Any, response_length: int) -> torch.Tensor:
    """Return the teacher's log-probs of the response, float32 [R], from what `score_response` (or a server)
    returned.

    Raises:
        ShortScoresError: there are fewer than R scores.
        MissingScoreError: one of them is null.
    """
    triples = answer["meta_info"]["input_token_logprobs"]
    if len(triples) < response_length:
        raise ShortScoresError(
            f"the teacher scored {len(triples)} positions; the response has {response_length} tokens."
        )
    scored = triples[len(triples) - response_length :]
    values = np.array([triple[0] for triple in scored], np.float32)  # null becomes NaN
    missing = np.flatnonzero(np.isnan(values))
    if missing.size:
        raise MissingScoreError(
            f"the teacher's log-prob of response token {missing[0]} of {response_length} is null; "
            "the server met NaN or -inf there, or the scores begin too late (logprob_start_len must be the "
            "prompt's length less one)."
        )
    return torch.from_numpy(values)


@dataclass(frozen=True, slots=True)
class _Request:
    """A sample as it goes over the wire, and what is known of its length there."""

    tokens: list[int]
    prompt_length: int
    """P, expanded, where `exact`; else a lower bound: scores are read from the end of a longer list."""
    exact: bool
    image_pads: int | None
    image_tokens: int


def _request(sample: Sample, facts: ModelFacts | None) -> _Request:
    """Bring the prompt into wire form (upstream slime holds it expanded) and count what it expands to."""
    cut = len(sample.tokens) - sample.response_length
    prompt, response = list(sample.tokens[:cut]), list(sample.tokens[cut:])
    if facts is None or facts.image_token_id is None:
        return _Request(
            prompt + response, len(prompt), exact=not _images(sample), image_pads=None, image_tokens=0
        )
    pad = facts.image_token_id
    if pad in response:
        raise PictureMismatchError(
            f"sample {sample.index} sampled the image pad (id {pad}) at response position "
            f"{response.index(pad)}; no server can score that. Ban it in the rollout (logit_bias)."
        )
    wire = collapse_image_pads(prompt, pad)
    pads = wire.count(pad)
    grids = _grids(sample)
    if grids is not None and len(grids) == pads:
        image_tokens = facts.image_tokens(grids)
    else:
        # without grids an expanded prompt still tells its length; one that is in wire form already does not
        image_tokens = prompt.count(pad)
    exact = pads == 0 or grids is not None or len(wire) < len(prompt)
    return _Request(wire + response, len(wire) - pads + image_tokens, exact, pads, image_tokens)


def _images(sample: Sample) -> Sequence[Any]:
    return (sample.multimodal_inputs or {}).get("images") or ()


def _grids(sample: Sample) -> list[tuple[int, ...]] | None:
    """Return the (t, h, w) of each picture, from a list or (upstream) a tensor; None without any."""
    grids = (sample.multimodal_train_inputs or {}).get("image_grid_thw")
    return None if grids is None else [tuple(int(side) for side in grid) for grid in grids]
