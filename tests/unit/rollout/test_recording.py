"""A recorded rollout is the rollout, bit for bit, or an error that names the file."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.arguments import Args
from slime.rollout.recording.columns import SCHEMA
from slime.rollout.recording.file import ROWS_AT_ONCE, read_rollout, write_rollout
from slime.rollout.recording.head import Head, RecordingError, read_head
from slime.rollout.recording.places import recorded_ids, recording_path, require_recorded
from slime.utils.types import Sample, SampleStatus
from tests.fakes.rollouts import answered_sample, rollout_args
from tests.fakes.tiny_model import make_picture, make_samples

HEAD = Head(
    rollout_id=7,
    student="student",
    model={"vocab_size": 131, "image_token_id": 5, "merge_size": 2},
    arguments=rollout_args().as_dict(),
    metrics={"reward": 0.1, "odd": math.inf},
    data_position={"epoch": 0, "position": 24},
)

FLOATS = st.floats(width=64) | st.sampled_from([-0.0, 5e-324, math.nan, -math.inf, 0.1])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = [make_picture(seed)[0] for seed in range(3)]
PICTURES = {name: png for name, png, _ in map(make_picture, range(3))}


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    length = draw(st.integers(0, 4))
    prompt = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3))
    response = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))

    def listed(values: st.SearchStrategy[Any]) -> list[Any] | None:
        return draw(st.none() | st.lists(values, min_size=length, max_size=length))

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        bits = draw(st.binary(min_size=4 * math.prod(shape), max_size=4 * math.prod(shape)))
        return torch.frombuffer(bytearray(bits + bytes(4)), dtype=dtype)[:-1].reshape(shape)

    top_k = draw(st.none() | st.integers(0, 3))
    shown = draw(st.none() | st.lists(st.sampled_from(NAMES), max_size=3))
    return Sample(
        index=draw(st.none() | st.integers(0, 2**62)),
        group_index=draw(st.none() | st.integers(0, 2**62)),
        prompt=draw(st.text(max_size=8) | st.lists(st.dictionaries(st.text(), JSON, max_size=2), max_size=2)),
        tokens=prompt + response,
        multimodal_train_inputs=None
        if shown is None
        else {"image_hashes": shown, "image_grid_thw": [(1, 4, 6 + place) for place in range(len(shown))]},
        response=draw(st.text(max_size=8)),
        response_length=length,
        label=draw(st.none() | st.text(max_size=4)),
        reward=draw(st.none() | FLOATS),
        loss_mask=listed(st.integers(0, 1)),
        rollout_log_probs=listed(FLOATS),
        teacher_log_probs=draw(st.just(None) | st.builds(lambda: tensor(length))),
        teacher_top_ids=None if top_k is None else tensor(length, top_k, dtype=torch.int32),
        teacher_top_log_probs=None if top_k is None else tensor(length, top_k),
        teacher_tail_mass=None if top_k is None else tensor(length),
        status=draw(st.sampled_from(SampleStatus)),
        metadata=draw(st.dictionaries(st.text(max_size=4).filter(lambda key: key != "error"), JSON)),
        weight_versions=draw(st.lists(st.text(max_size=3), max_size=2)),
    )


def bits(value: Any) -> Any:
    """Return a value in a form in which equality means the same type and the same bits; no NaN differs."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    if isinstance(value, Mapping):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value).__name__, [bits(entry) for entry in value]
    return type(value).__name__, value


def assert_same(read: list[Sample], written: list[Sample]) -> None:
    for one, other in zip(read, written, strict=True):
        for field in fields(Sample):
            if field.name != "multimodal_inputs":
                ours, theirs = (bits(getattr(sample, field.name)) for sample in (one, other))
                assert ours == theirs, field.name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(written=st.lists(samples(), max_size=5))
def test_what_is_written_is_read_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, written: list[Sample]):
    path = tmp_path_factory.mktemp("recorded") / "rollout.parquet"
    write_rollout(path, HEAD, written, PICTURES)
    read = read_rollout(path)
    assert read.head == HEAD == read_head(path)
    assert_same(read.samples, written)
    shown = {
        name for sample in written for name in (sample.multimodal_train_inputs or {}).get("image_hashes", [])
    }
    assert read.pictures == {name: PICTURES[name] for name in shown}


def test_more_samples_than_a_row_group_takes(tmp_path: Path):
    written, pictures = make_samples(ROWS_AT_ONCE + 8, group_size=4)
    write_rollout(tmp_path / "r.parquet", HEAD, written, pictures)
    assert pq.ParquetFile(tmp_path / "r.parquet").num_row_groups == 2
    read = read_rollout(tmp_path / "r.parquet")
    assert_same(read.samples, written)
    assert read.pictures == pictures


def test_tensors_are_of_their_own_memory_and_can_be_written_to(tmp_path: Path):
    written, pictures = make_samples(2)
    write_rollout(tmp_path / "r.parquet", HEAD, written, pictures)
    first, second = read_rollout(tmp_path / "r.parquet").samples
    assert first.teacher_log_probs is not None
    assert second.teacher_log_probs is not None
    first.teacher_log_probs.zero_()
    assert second.teacher_log_probs.abs().min() > 0


def test_a_file_is_plain_parquet_with_each_picture_once(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    written, pictures = make_samples(8)
    write_rollout(tmp_path / "r.parquet", HEAD, written, pictures)
    frame = pandas.read_parquet(tmp_path / "r.parquet")
    assert list(frame.columns) == SCHEMA.names
    assert frame["tokens"][0].tolist() == written[0].tokens
    assert frame["teacher_log_probs"][3].dtype == np.float32
    assert json.loads(frame["metadata"][2]) == written[2].metadata
    pngs = [png for row in frame["image_pngs"] if row is not None for png in row if png is not None]
    assert sorted(pngs) == sorted(pictures.values())
    (first,) = frame["image_pngs"][0]
    assert first == pictures[frame["image_hashes"][0][0]]
    assert frame["image_pngs"][1].tolist() == [None]


def test_a_tuple_in_metadata_comes_back_as_a_list(tmp_path: Path):
    write_rollout(tmp_path / "r.parquet", HEAD, [answered_sample(metadata={"size": (1, 2)})], {"abc": b""})
    assert read_rollout(tmp_path / "r.parquet").samples[0].metadata == {"size": [1, 2]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": {"state": torch.zeros(1)}}, r"metadata\['state'\] is or holds a Tensor.*no JSON"),
        ({"metadata": {"by_id": {"rows": [{3: "x"}]}}}, r"metadata\['by_id'\] is or holds the key 3"),
        ({"metadata": {4: "x"}}, r"metadata\[4\] is or holds the key 4"),
        ({"prompt": [{"role": "user", "content": b"x"}]}, "prompt is or holds a bytes"),
        ({"reward": {"meta_info": {}}}, "its reward is .*no number"),
        ({"loss_mask": [1, 0.5, 1]}, r"loss_mask\[1\] is 0.5, which is no int8"),
        ({"loss_mask": [1, 300, 1]}, r"loss_mask\[1\] is 300"),
        ({"rollout_log_probs": [-1.0, None, -1.0]}, "rollout_log_probs .*no list of numbers"),
        ({"tokens": [1, 2**31, 3]}, r"tokens\[1\] is 2147483648"),
        ({"tokens": [[1], [2, 3]]}, "tokens .*no list of numbers"),
        ({"teacher_log_probs": torch.zeros(3, dtype=torch.float64)}, "tensor of torch.float64, and float32"),
        ({"teacher_log_probs": [0.0] * 3}, "teacher_log_probs .*no tensor of 1 dim"),
        ({"teacher_top_ids": torch.zeros(3, 2).int(), "teacher_top_log_probs": torch.zeros(3, 4)},
         r"widths \[2, 4\]"),
        ({"response": "\ud800"}, "response is .*no string"),
        ({"label": 4}, "label is 4, which is no string"),
        ({"multimodal_train_inputs": {"image_hashes": ["0123456789abcdef"], "image_grid_thw": [(1, 4, 6)]}},
         "picture 0123456789ab… are not at hand"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_named_and_nothing_is_left(
    tmp_path: Path, changes: dict[str, Any], words: str
):
    rollout = [answered_sample(3), replace(answered_sample(4), **changes)]
    with pytest.raises(RecordingError, match=f"sample 4 cannot be recorded: .*{words}"):
        write_rollout(tmp_path / "r.parquet", HEAD, rollout, {"abc": b"png"})
    assert list(tmp_path.iterdir()) == []


def test_a_rewritten_file_is_the_old_or_the_new(tmp_path: Path):
    path = tmp_path / "r.parquet"
    write_rollout(path, HEAD, [answered_sample(1)], {"abc": b"png"})
    with pytest.raises(RecordingError):
        write_rollout(path, HEAD, [answered_sample(2, reward={})], {"abc": b"png"})
    assert [sample.index for sample in read_rollout(path).samples] == [1]
    write_rollout(path, HEAD, [answered_sample(2)], {"abc": b"png"})
    assert [sample.index for sample in read_rollout(path).samples] == [2]


def test_no_secret_gets_into_a_file(tmp_path: Path):
    args = rollout_args(rm_url="http://me:hunter2@host:1/generate")
    error = "HttpError: http://me:hunter2@host:1/generate?key=hunter2 answered HTTP 500"
    failed = answered_sample(metadata={"error": error})
    write_rollout(tmp_path / "r.parquet", replace(HEAD, arguments=args.as_dict()), [failed], {"abc": b"png"})
    assert read_head(tmp_path / "r.parquet").arguments["rm_url"] == "http://***@host:1/generate"
    (read,) = read_rollout(tmp_path / "r.parquet").samples
    assert read.metadata["error"] == "HttpError: http://***@host:1/generate?*** answered HTTP 500"


def refused(path: Path) -> str:
    """Return what both readers say, which is the same."""
    said = []
    for read in (read_head, read_rollout):
        with pytest.raises(RecordingError) as caught:
            read(path)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert str(path) in said[0]
    return said[0]


def test_a_file_that_is_none_is_named(tmp_path: Path):
    path = tmp_path / "r.parquet"
    assert "there is no recorded rollout" in refused(path)
    pq.write_table(pa.table({"a": [1]}), path)
    assert "no recorded rollout: its schema metadata has no slime.format" in refused(path)
    pq.write_table(pa.table({"a": [1]}, metadata={"slime.format": "2"}), path)
    assert "format 2, and format 1 is read here" in refused(path)
    pq.write_table(pa.table({"a": [1]}, metadata={"slime.format": "1"}), path)
    assert "cut off or damaged" in refused(path)
    pq.write_table(pa.table({"a": [1]}, metadata=HEAD.to_metadata()), path)
    with pytest.raises(RecordingError, match="other columns"):
        read_rollout(path)


def test_a_file_that_is_cut_off_or_damaged_is_named(tmp_path: Path):
    path = tmp_path / "r.parquet"
    written, pictures = make_samples(8)
    write_rollout(path, HEAD, written, pictures)
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cut off or damaged" in refused(path)
    at = whole.index(next(iter(pictures.values()))[100:140]) + 20
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(RecordingError, match="cut off or damaged"):
        read_rollout(path)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/runs/a", "/runs/a/rollout-000012.parquet"),
        ("/runs/a/{rollout_id}.parquet", "/runs/a/12.parquet"),
        ("/runs/{rollout_id:04d}/{rollout_id}", "/runs/0012/12"),
        ("/runs/{{a}}", "/runs/{a}/rollout-000012.parquet"),
        ("/runs/one.parquet", "/runs/one.parquet"),
    ],
)
def test_where_a_rollout_lies(place: str, name: str):
    assert recording_path(place, 12) == Path(name)


def record(place: Path | str, *rollout_ids: int, **changes: Any) -> None:
    for rollout_id in rollout_ids:
        head = replace(HEAD, **{"rollout_id": rollout_id, **changes})
        write_rollout(recording_path(str(place), rollout_id), head, [], {})


def replaying(place: Path | str, *flags: str) -> Args:
    return rollout_args("--load-debug-rollout-data", str(place), *flags, rm_url=None)


def test_which_rollouts_are_there(tmp_path: Path):
    record(tmp_path / "[a]", 3, 1, 2_000_000)
    for name in ("rollout-7", "rollout-3"):
        (tmp_path / "[a]" / f"{name}.parquet").touch()
    (tmp_path / "[a]" / "notes.txt").touch()
    assert recorded_ids(str(tmp_path / "[a]")) == [1, 3, 2_000_000]
    template = str(tmp_path / "{rollout_id}" / "r-{rollout_id}.parquet")
    record(template, 4, 11)
    assert recorded_ids(template) == [4, 11]
    assert recorded_ids(str(tmp_path / "nothing")) == recorded_ids(str(tmp_path / "no.parquet")) == []


def test_a_whole_recording_is_accepted(tmp_path: Path):
    record(tmp_path, 0, 1)
    require_recorded(replaying(tmp_path), 0)
    require_recorded(replaying(tmp_path, "--num-rollout", "9"), 9)


@pytest.mark.parametrize(
    ("ids", "first", "flags", "words"),
    [
        ((), 0, (), "needs rollout 0, and --load-debug-rollout-data .* has none"),
        ((0, 1), 0, ("--num-rollout", "5"), "rollout 2.* has 2, the first 0, the last 1. Use --num-rollo"),
        ((4, 5), 0, (), "needs rollout 0.* has 2, the first 4, the last 5. --load a checkpoint .* rollout 4"),
        ((0, 2, 3), 0, ("--num-rollout", "4"), "rollout 1.* has 3, the first 0, the last 3. Copy the"),
        ((0, 1), 0, ("--rollout-batch-size", "4"),
         "--rollout-batch-size 3 --n-samples-per-prompt 2, and this run has --rollout-batch-size 4 --n-s"),
        ((0, 1), 0, ("--custom-rm-path", "a.b"), "judged with --custom-rm-path None, and this run has a.b"),
        ((0, 1), 0, ("--rm-type", "a.b"), "judged with --rm-type None, and this run has a.b"),
        ((0, 1), 0, ("--rollout-temperature", "0.5"), "sampled with --rollout-temperature 1.0, .* has 0.5"),
        ((0, 1), 0, ("--opd-loss", "topk", "--sample-from", "teacher"), "with --sample-from student"),
    ],
)  # fmt: skip
def test_a_recording_that_does_not_fit_is_found_at_the_start(
    tmp_path: Path, ids: tuple[int, ...], first: int, flags: tuple[str, ...], words: str
):
    record(tmp_path, *ids)
    with pytest.raises(RecordingError, match=words):
        require_recorded(replaying(tmp_path, *flags), first)


def test_a_file_under_a_wrong_name_is_no_rollout_of_that_number(tmp_path: Path):
    record(tmp_path, 0)
    (tmp_path / "rollout-000000.parquet").rename(tmp_path / "rollout-000001.parquet")
    record(tmp_path, 0)
    with pytest.raises(RecordingError, match="stands for rollout 1 and was recorded as rollout 0"):
        require_recorded(replaying(tmp_path), 0)


def test_one_file_is_every_rollout(tmp_path: Path):
    record(tmp_path / "{rollout_id}.parquet", 12)
    require_recorded(replaying(tmp_path / "12.parquet", "--num-rollout", "3"), 0)
    with pytest.raises(RecordingError, match="has none"):
        require_recorded(replaying(tmp_path / "13.parquet"), 0)
