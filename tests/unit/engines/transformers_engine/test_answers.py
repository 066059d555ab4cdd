"""Answers in their rarer forms: flat and base64 alternatives, token text."""

import base64

import numpy as np
import pytest

from slime.engines.transformers_engine.answers import AnswerWriter
from slime.engines.transformers_engine.stopping import StopChecker
from tests.unit.engines.transformers_engine.support import (
    TEXT_PROMPT,
    load_parts,
    make_job,
    make_stepper,
    run,
)


def meta(**body):
    body = {"return_logprob": True, "logprob_start_len": 3, "top_logprobs_num": 2} | body
    job = make_job(TEXT_PROMPT, max_new_tokens=3, temperature=0, body=body)
    run(make_stepper(), [job])
    writer = AnswerWriter(StopChecker(load_parts()[0]), 384)
    answer = writer.answer(job, weight_version="v1", received=0.0, prompt_token_ids=False)
    return answer["meta_info"]


def test_flat_and_base64_say_what_the_rows_say():
    rows = meta()
    flat = meta(return_flat_raw_top_logprobs=True, return_flat_raw_output_top_logprobs=True)
    packed = meta(
        return_flat_raw_top_logprobs=True,
        return_flat_raw_output_top_logprobs=True,
        return_flat_raw_top_logprobs_b64=True,
    )
    for side, null_prefix, count in (("input", 1, len(TEXT_PROMPT) - 4), ("output", 0, 3)):
        prefix = f"{side}_top_logprobs"
        entries = [entry for row in rows[prefix] if row is not None for entry in row]
        assert flat[f"{prefix}_shape"] == packed[f"{prefix}_shape"] == [count, 2]
        assert flat[f"{prefix}_null_prefix"] == null_prefix
        assert flat[f"{prefix}_val_flat"] == [value for value, _, _ in entries]
        assert flat[f"{prefix}_idx_flat"] == [id_ for _, id_, _ in entries]
        values = np.frombuffer(base64.b64decode(packed[f"{prefix}_val_flat_b64"]), "<f4")
        ids = np.frombuffer(base64.b64decode(packed[f"{prefix}_idx_flat_b64"]), "<i4")
        assert values == pytest.approx(flat[f"{prefix}_val_flat"])
        assert ids.tolist() == flat[f"{prefix}_idx_flat"]
        assert prefix not in flat


def test_without_log_probs_there_are_none():
    fields = meta(return_logprob=False)
    assert not [key for key in fields if "logprobs" in key]
    assert fields["completion_tokens"] == 3
    assert fields["weight_versions"] == [{"version": "v1", "start": 0, "end": 3}]
