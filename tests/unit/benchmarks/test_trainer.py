"""The benchmark of the trainer: both ways take the same step, and it counts right.

No time is asserted: what the benchmark measures depends on the machine.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.benchmarks import trainer
from scripts.benchmarks.training.measuring import measured, memory
from scripts.benchmarks.training.report import ratios, table
from scripts.benchmarks.training.workload import Shape, make_samples
from slime.utils.pictures import decode_image

SMALL = Shape(vocabulary=2_000, prompts=1, samples=4, longest=64, side=64)


def record(wall: float, cpu: float, peak: float, **values: float) -> dict[str, Any]:
    return {"wall": wall, "cpu": cpu, "peak_bytes": peak, "values": values}


@pytest.mark.parametrize("top_k", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_both_ways_run_and_take_the_same_step(tmp_path, top_k):
    path = tmp_path / "results.json"
    argv = [
        "--top-k",
        str(top_k),
        "--vocabulary",
        "2000",
        "--prompts",
        "1",
        "--samples",
        "4",
        "--longest",
        "64",
        "--side",
        "64",
    ]
    assert trainer.main([*argv, "--rounds", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result["ratios"]) == {"tokens per second", "CPU, ms a token", "peak memory of a step, MB"}
    assert set(result["records"]) == {"apart" if top_k else "plain", "ours"}
    for records in result["records"].values():
        [step] = records
        assert step["wall"] > 0
        assert step["cpu"] > 0
        assert step["peak_bytes"] > 0
        assert step["values"]["grad_norm"] > 0
    assert result["records"]["ours"][0]["values"]["micro_batches"] == SMALL.micro_batches


def test_ways_that_disagree_end_the_run():
    first = {"plain": record(1, 1, 1, grad_norm=1.0), "ours": record(1, 1, 1, grad_norm=1.01)}
    with pytest.raises(RuntimeError, match=r"different steps: grad_norm 1 the plain way, 1\.01 ours"):
        trainer.require_same_step(first)
    first["ours"]["values"]["grad_norm"] = 1.0001
    trainer.require_same_step(first)


def test_numbers_are_medians_and_ratios_say_how_much_better_ours_is():
    plain = [record(8.0, 4.0, 900e6), record(2.0, 5.0, 800e6), record(4.0, 6.0, 1000e6)]
    ours = [record(2.0, 2.0, 300e6), record(1.0, 2.0, 100e6), record(9.0, 2.5, 200e6)]
    assert ratios(SMALL, plain, ours) == pytest.approx(
        {"tokens per second": 2.0, "CPU, ms a token": 2.5, "peak memory of a step, MB": 4.5}
    )
    rows = table(SMALL, plain, ours).splitlines()
    assert rows[2] == f"| tokens per second | {SMALL.tokens / 4:,.0f} | {SMALL.tokens / 2:,.0f} | 2.0 |"
    assert rows[4] == "| peak memory of a step, MB | 900 | 200 | 4.5 |"


def test_the_workload_has_the_sizes_of_its_shape():
    samples, pictures = make_samples(SMALL)
    lengths = [sample.response_length for sample in samples]
    assert lengths == SMALL.responses()
    assert (min(lengths), max(lengths)) == (32, 64)
    assert SMALL.prompt == 36 + 4
    assert all(len(sample.tokens) == 36 + 1 + sample.response_length for sample in samples)
    assert SMALL.tokens == sum(lengths) + 4 * 40
    pairs = [lengths[:2], lengths[2:]]
    assert SMALL.padded_tokens == sum(2 * (40 + max(pair)) for pair in pairs)
    [png] = pictures.values()
    assert decode_image(png).size == (64, 64)


def test_memory_that_a_step_gave_back_still_counts():
    before = memory("RssAnon")
    cost = measured(lambda: {"last": float((bytearray(b"\1") * 200_000_000)[-1])})
    # The kernel counts each core's pages by itself, and sums them up later: the more cores, the less exact.
    assert 150e6 < cost["peak_bytes"] < 300e6
    assert memory("RssAnon") - before < 100e6
    assert cost["values"] == {"last": 1.0}
