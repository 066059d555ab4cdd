"""Log-probs of prompt positions: the LM head over the wanted rows of a prefill only, in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slime.engines.transformers_engine.job import Job, PositionLogprobs, TopRow
from slime.engines.transformers_engine.model import EngineModel

CHUNK_LOGITS = 2**25
"""Float32 logits held at once: 128 MiB."""


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a prefill whose logits are wanted: those that predict the job's reported tokens."""

    job: Job
    row: int
    begin: int
    end: int


def wanted_span(job: Job, row: int) -> Span:
    """Return the positions of prefill row `row` that predict the job's reported prompt tokens.

    The first reported token has no log-prob. A scoring job that asks for alternatives also gets those after
    its last token, as the real server gives them.
    """
    length = job.prompt.length
    begin = min(job.logprobs.first_input(length), length - 1)
    phantom = job.scoring and job.logprobs.wanted and bool(job.logprobs.top or job.logprobs.token_ids)
    return Span(job, row, begin, length if phantom else length - 1)


@torch.inference_mode()
def prompt_logprobs(model: EngineModel, hidden: Tensor, spans: Sequence[Span]) -> list[PositionLogprobs]:
    """Return for each span the log-probs at its positions, out of final hidden states `[U, T, H]`."""
    rows = np.concatenate([np.full(span.end - span.begin, span.row) for span in spans])
    places = np.concatenate([np.arange(span.begin, span.end) for span in spans])
    targets = np.concatenate([_targets(span) for span in spans])
    index = torch.from_numpy(rows * hidden.shape[1] + places).to(model.device)
    target = torch.from_numpy(targets).to(model.device)
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = max(1, CHUNK_LOGITS // model.vocab_size)
    most = max(span.job.logprobs.top for span in spans)
    values: list[float] = []
    tops: list[TopRow] = []
    chosen: list[TopRow] = []
    ids = sorted({id_ for span in spans for id_ in span.job.logprobs.token_ids})
    for start in range(0, len(index), chunk):
        log_probs = model.logits(flat[index[start : start + chunk]]).log_softmax(-1)
        values += log_probs.gather(1, target[start : start + chunk, None])[:, 0].tolist()
        tops += top_rows(log_probs, most) if most else []
        chosen += id_rows(log_probs, ids) if ids else []
    return _split(spans, values, tops, chosen, ids)


def top_rows(log_probs: Tensor, count: int) -> list[TopRow]:
    """Return each row's `count` likeliest tokens of `[N, V]`, likeliest first."""
    values, ids = log_probs.topk(min(count, log_probs.shape[1]), dim=-1)
    return [TopRow(*row) for row in zip(values.cpu().numpy(), ids.int().cpu().numpy(), strict=True)]


def id_rows(log_probs: Tensor, ids: Sequence[int]) -> list[TopRow]:
    """Return the log-probs of `ids` in each row of `[N, V]`."""
    values = log_probs[:, torch.tensor(ids, device=log_probs.device)].cpu().numpy()
    return [TopRow(row, np.asarray(ids, np.int32)) for row in values]


def _targets(span: Span) -> np.ndarray:
    following = span.job.prompt.target_ids[span.begin + 1 : span.end + 1]
    return np.pad(following, (0, span.end - span.begin - len(following)))


def _split(
    spans: Sequence[Span], values: list[float], tops: list[TopRow], chosen: list[TopRow], ids: list[int]
) -> list[PositionLogprobs]:
    results, start = [], 0
    for span in spans:
        end = start + span.end - span.begin
        options = span.job.logprobs
        places = [ids.index(id_) for id_ in options.token_ids]
        results.append(
            PositionLogprobs(
                values=values[start:end],
                top=[row.first(options.top) for row in tops[start:end]] if options.top else [],
                token_ids=[TopRow(row.values[places], row.ids[places]) for row in chosen[start:end]]
                if places
                else [],
            )
        )
        start = end
    return results
