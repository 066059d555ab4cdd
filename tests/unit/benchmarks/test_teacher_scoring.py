"""The benchmark of teacher scoring: it runs, its stand-in answers like SGLang, and it counts right.

No time is asserted: what the benchmark measures depends on the machine.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from scripts.benchmarks import teacher_scoring
from scripts.benchmarks.scoring.radix import Asked, count
from scripts.benchmarks.scoring.report import percentile
from scripts.benchmarks.scoring.stub import Stub, png_size
from scripts.benchmarks.scoring.workload import QWEN3_VL, Shape, make_groups, picture_tokens
from slime.utils.pictures import picture_uri
from tests.contracts.engine_api.support import load_exchanges

PAD = 9
PROMPT, RESPONSE, SAMPLES = 80, 16, 3


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Each client's turns of one small run."""
    path = tmp_path_factory.mktemp("benchmark") / "results.json"
    shape = f"256:{PROMPT}:{RESPONSE}"
    argv = ["--shapes", shape, "--groups", "2", "--samples", str(SAMPLES), "--rounds", "1"]
    assert teacher_scoring.main([*argv, "--json", str(path)]) == 0
    [result] = json.loads(path.read_text())
    return result["records"]


def test_our_answers_hold_the_response_and_a_placeholder(results):
    assert set(results["ours"][0]["entries"]) == {RESPONSE + 1}
    assert set(results["plain"][0]["entries"]) == {PROMPT + RESPONSE}


def test_prompt_and_picture_are_prefilled_once_a_group(results):
    whole = SAMPLES * (PROMPT + RESPONSE)
    plain, ours = (results[name][0]["server"] for name in ("plain", "ours"))
    assert plain["prefilled_tokens"] == 2 * whole
    assert ours["prefilled_tokens"] == 2 * (whole - (SAMPLES - 1) * (PROMPT - 1))
    assert (plain["vision_passes"], ours["vision_passes"]) == (2 * SAMPLES, 2)
    assert plain["requests"] == ours["requests"] == 2 * SAMPLES


def test_both_clients_read_the_same_log_probs(results):
    plain, ours = (results[name][0]["sums"] for name in ("plain", "ours"))
    assert plain == pytest.approx(ours, abs=1e-3)
    assert len(set(plain)) == 2 * SAMPLES


def test_every_turn_is_measured(results):
    for records in results.values():
        assert all(
            record["cpu"] > 0 and record["wall"] > 0 and record["peak_bytes"] > 0 for record in records
        )
        assert all(record["server"]["bytes_in"] > 0 < record["server"]["bytes_out"] for record in records)


def test_clients_that_disagree_end_the_run():
    records = {"plain": [{"sums": [-3.0]}], "ours": [{"sums": [-3.1]}]}
    with pytest.raises(RuntimeError, match="different log-probs"):
        teacher_scoring.require_same_scores(records)


@pytest.mark.parametrize("shape", ["512", "512:a:3", "512:200:8", "64:80:8"])
def test_a_shape_that_cannot_be_is_refused(capsys, shape):
    assert teacher_scoring.main(["--shapes", shape]) == 2
    assert repr(shape) in capsys.readouterr().err


def test_the_workload_has_the_sizes_of_its_shape():
    shape = Shape.parse("400:220:30", groups=2, samples=3)
    groups = make_groups(shape, QWEN3_VL, turn=0)
    again = make_groups(shape, QWEN3_VL, turn=1)
    for group, repeated in zip(groups, again, strict=True):
        assert group.prompt.count(QWEN3_VL.image_pad) == 1
        assert len(group.prompt) - 1 + picture_tokens(400, 400) == 220
        assert [len(response) for response in group.responses] == [30] * 3
        assert group.prompt == repeated.prompt
        assert picture_uri(group.picture) != picture_uri(repeated.picture)


# ---- the stand-in ----


def test_the_stand_in_answers_in_the_form_of_a_recorded_server():
    recorded = load_exchanges()["31_img_start_24"]
    meta = recorded["response"]["meta_info"]
    request = recorded["request"]
    stub = Stub(QWEN3_VL)
    tokens = [QWEN3_VL.image_pad if token == 346 else token for token in request["input_ids"]]
    answer = stub._answer(tokens, request["logprob_start_len"], meta["image_tokens"])
    assert set(answer) == set(recorded["response"])
    assert set(answer["meta_info"]) == set(meta)
    for name in ("prompt_tokens", "image_tokens", "finish_reason", "completion_tokens"):
        assert answer["meta_info"][name] == meta[name]
    assert [entry[1:] for entry in answer["meta_info"]["input_token_logprobs"]] == [
        entry[1:] for entry in meta["input_token_logprobs"]
    ]
    assert [entry[0] is None for entry in answer["meta_info"]["input_token_logprobs"]] == [
        entry[0] is None for entry in meta["input_token_logprobs"]
    ]


def test_picture_sizes_are_read_from_the_data_uri():
    [group] = make_groups(Shape.parse("300:120:1", groups=1, samples=1), QWEN3_VL, turn=0)
    buffer = io.BytesIO()
    group.picture.resize((320, 288)).save(buffer, format="PNG")
    assert png_size(picture_uri(buffer.getvalue())) == (320, 288)


# ---- the model of a prefix cache ----


def asked(tokens: list[int], start: int, arrived: float, *, answered: float = 0.5, picture: int = 1) -> Asked:
    """A request that was answered `answered` seconds after it came; a picture counts four tokens."""
    pads = tokens.count(PAD)
    return Asked(arrived, arrived + answered, tokens, start, [4] * pads, [picture] * pads, PAD)


def test_a_prefix_is_reused_up_to_the_start_alone():
    first, second = [1, PAD, 2, 3, 4], [1, PAD, 2, 3, 5]
    totals = count([asked(first, 5, 0), asked(second, 5, 1)])
    assert totals["cached_tokens"] == 5  # of 7 that are shared
    assert totals["prefilled_tokens"] == 8 + 3
    assert totals["vision_passes"] == 1
    assert totals["entries"] == 3 + 3


def test_from_zero_nothing_is_reused():
    totals = count([asked([1, PAD, 2], 0, place) for place in range(4)])
    assert totals["cached_tokens"] == 0
    assert totals["vision_passes"] == 4


def test_requests_in_flight_together_do_not_help_each_other():
    together = [asked([1, PAD, 2, 3], 5, place / 10) for place in range(3)]
    assert count(together)["vision_passes"] == 3
    in_turn = [asked([1, PAD, 2, 3], 5, place) for place in range(3)]
    assert count(in_turn)["vision_passes"] == 1


def test_another_picture_is_another_prefix():
    requests = [asked([1, PAD, 2, 3], 5, 0, picture=1), asked([1, PAD, 2, 3], 5, 1, picture=2)]
    totals = count(requests)
    assert totals["cached_tokens"] == 1
    assert totals["vision_passes"] == 2


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([float(value) for value in range(1, 101)], 0.99) == 99.0
