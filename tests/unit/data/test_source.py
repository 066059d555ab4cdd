"""The prompt source: groups, order, epochs, resuming, bad rows; and evaluation sets."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime.arguments import Args
from slime.data.errors import BadRow, DataError
from slime.data.expand import expand_image_pads
from slime.data.picture_store import PictureStore
from slime.data.source import EvalSet, PromptSource

Write = Callable[..., str]
MakeArgs = Callable[..., Args]
MakeRow = Callable[..., dict[str, Any]]


def rows_of(source: PromptSource, count: int) -> list[int]:
    """Return the row numbers of the next groups."""
    return [group[0].metadata["data_row"] for group in source.next_groups(count)]


def test_group_is_n_samples_of_one_prompt(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    rows = [make_row(number, metadata={"origin": "geo"}) for number in range(3)]
    path = parquet(rows)
    source = PromptSource(make_args(path), processor, PictureStore())
    first, second = source.next_groups(2)
    assert [(s.group_index, s.index) for s in [*first, *second]] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    sample = second[1]
    assert sample.label == "1"
    assert sample.metadata == {"origin": "geo", "data_file": path, "data_row": 2}
    assert sample.response_length == 0
    assert sample.multimodal_inputs is not None
    assert second[0].multimodal_inputs is not None
    assert sample.multimodal_inputs["images"][0] is second[0].multimodal_inputs["images"][0]
    sample.tokens.append(1)
    sample.metadata["mine"] = True
    assert second[0].tokens != sample.tokens
    assert "mine" not in second[0].metadata


def test_wire_form_expands_to_what_the_processor_makes(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    two = make_row(1)["images"] + make_row(30)["images"]
    store = PictureStore()
    source = PromptSource(
        make_args(parquet([make_row(0, problem="<image> and <image>?", images=two)])), processor, store
    )
    sample = source.next_groups(1)[0][0]
    assert sample.multimodal_inputs is not None
    assert sample.multimodal_train_inputs is not None
    assert sample.tokens.count(processor.image_token_id) == 2
    made = processor(text=sample.prompt, images=sample.multimodal_inputs["images"], return_tensors="pt")
    grids = sample.multimodal_train_inputs["image_grid_thw"]
    expanded = expand_image_pads(sample.tokens, grids, processor.image_token_id, processor.merge_size)
    assert made["input_ids"][0].tolist() == expanded
    assert made["image_grid_thw"].tolist() == [list(grid) for grid in grids]
    pngs = store.png(sample.multimodal_train_inputs["image_hashes"])
    assert [len(png) > 0 for png in pngs.values()] == [True, True]


def test_text_rows_have_no_pictures(processor: Any, make_args: MakeArgs, jsonl: Write) -> None:
    path = jsonl(
        [{"problem": "1+1", "answer": 2, "images": []}, {"problem": "2+2", "answer": 4.0, "images": None}]
    )
    groups = PromptSource(make_args(path), processor, PictureStore()).next_groups(2)
    assert [group[0].label for group in groups] == ["2", "4.0"]
    assert all(sample.multimodal_inputs is None for group in groups for sample in group)
    assert all(sample.multimodal_train_inputs is None for group in groups for sample in group)


def test_a_single_picture_needs_no_list_and_paths_are_relative_to_the_file(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, jsonl: Write, tmp_path: Path
) -> None:
    data = make_row(3)["images"][0]["bytes"]
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    path = jsonl(
        [{"problem": "q", "answer": "1", "images": images} for images in ("pictures/a.png", uri, [uri])]
    )
    groups = PromptSource(make_args(path), processor, PictureStore()).next_groups(3)
    inputs = [group[0].multimodal_train_inputs or {} for group in groups]
    assert len({each["image_hashes"][0] for each in inputs}) == 1
    moved = make_args(path, "--image-root", str(tmp_path / "pictures"))
    with pytest.raises(BadRow, match=r"train.jsonl, row 1: picture 1: .*cannot be read"):
        PromptSource(moved, processor, PictureStore()).next_groups(1)


def test_order_is_the_files_without_shuffling(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    source = PromptSource(
        make_args(parquet([make_row(number) for number in range(3)])), processor, PictureStore()
    )
    assert rows_of(source, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_shuffling_is_by_seed_and_epoch(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path = parquet([make_row(number) for number in range(6)])
    args = make_args(path, "--rollout-shuffle", "--seed", "5")
    first, again = (
        rows_of(PromptSource(args, processor, PictureStore()), 12),
        rows_of(PromptSource(args, processor, PictureStore()), 12),
    )
    assert first == again
    assert sorted(first[:6]) == sorted(first[6:]) == [1, 2, 3, 4, 5, 6]
    assert first[:6] != first[6:]
    assert (
        rows_of(
            PromptSource(make_args(path, "--rollout-shuffle", "--seed", "6"), processor, PictureStore()), 6
        )
        != first[:6]
    )


def test_global_random_state_is_left_alone(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path = parquet([make_row(number) for number in range(4)])
    random.seed(1)
    np.random.seed(1)
    expected = (random.Random(1).random(), np.random.RandomState(1).rand())
    PromptSource(make_args(path, "--rollout-shuffle"), processor, PictureStore()).next_groups(6)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7, 13])
def test_resumed_source_goes_on_as_the_uninterrupted_one(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, jsonl: Write, taken: int
) -> None:
    rows = [{"problem": f"p{n}", "answer": "1", "images": []} for n in range(5)]
    rows[2]["problem"] = "<image> that is not there"
    args = make_args(jsonl(rows), "--rollout-shuffle", "--bad-rows", "skip")
    whole, part, resumed = (PromptSource(args, processor, PictureStore()) for _ in range(3))
    whole.next_groups(taken)
    part.next_groups(taken)
    resumed.load_state_dict(part.state_dict())
    expected = [(s.index, s.group_index, s.prompt) for group in whole.next_groups(9) for s in group]
    assert [(s.index, s.group_index, s.prompt) for group in resumed.next_groups(9) for s in group] == expected
    assert resumed.bad_rows == whole.bad_rows


def test_position_does_not_depend_on_how_groups_are_asked_for(
    processor: Any, make_args: MakeArgs, jsonl: Write
) -> None:
    rows = [
        {"problem": f"p{n}", "answer": "1", "images": ["missing.png"] if n in (1, 2) else []}
        for n in range(7)
    ]
    args = make_args(jsonl(rows), "--rollout-shuffle", "--bad-rows", "skip")
    at_once, one_by_one = (
        PromptSource(args, processor, PictureStore()),
        PromptSource(args, processor, PictureStore()),
    )
    together = [group[0].prompt for group in at_once.next_groups(12)]
    assert [one_by_one.next_groups(1)[0][0].prompt for _ in range(12)] == together
    assert at_once.state_dict() == one_by_one.state_dict()


def test_state_of_other_data_or_order_is_refused(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    rows = [make_row(number) for number in range(4)]
    state = PromptSource(
        make_args(parquet(rows), "--rollout-shuffle"), processor, PictureStore()
    ).state_dict()
    shorter = PromptSource(
        make_args(parquet(rows[:3], "b.parquet"), "--rollout-shuffle"), processor, PictureStore()
    )
    with pytest.raises(DataError, match="data set of 4 rows"):
        shorter.load_state_dict(state)
    rows[0]["answer"] = "other"
    changed = PromptSource(
        make_args(parquet(rows, "c.parquet"), "--rollout-shuffle"), processor, PictureStore()
    )
    with pytest.raises(DataError, match="other contents"):
        changed.load_state_dict(state)
    rows[0]["answer"] = "0"
    ordered = PromptSource(make_args(parquet(rows, "d.parquet")), processor, PictureStore())
    with pytest.raises(DataError, match="--rollout-shuffle"):
        ordered.load_state_dict(state)


BAD_TEXT = {
    "empty prompt": {"problem": None},
    "empty label": {"answer": None},
    "more placeholders": {"problem": "<image><image>"},
    "special tokens": {"problem": "<image><|im_end|>"},
    "strange metadata": {"metadata": "text"},
    "strange label": {"answer": ["1"]},
    "truth for a label": {"answer": True},
    "nested without end": {
        "problem": [{"role": "user", "content": "<image>", "more": json.loads("[" * 300 + "]" * 300)}]
    },
}


@pytest.mark.parametrize("change", BAD_TEXT.values(), ids=BAD_TEXT.keys())
def test_bad_text_is_refused_when_the_data_is_opened(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, jsonl: Write, change: dict[str, Any]
) -> None:
    rows = [{**make_row(n), "images": ["x.png"]} for n in range(3)]
    rows[1].update(change)
    with pytest.raises(BadRow, match=r"train.jsonl, row 2: ") as refused:
        PromptSource(make_args(jsonl(rows)), processor, PictureStore())
    assert (refused.value.row, Path(refused.value.file).name) == (2, "train.jsonl")


def test_a_number_that_is_none_is_no_label(processor: Any, make_args: MakeArgs, parquet: Write) -> None:
    rows = [{"problem": "q", "answer": value, "images": []} for value in (1.5, float("nan"), float("inf"))]
    source = PromptSource(make_args(parquet(rows), "--bad-rows", "skip"), processor, PictureStore())
    assert [group[0].label for group in source.next_groups(2)] == ["1.5", "1.5"]
    assert source.bad_rows == 2


@pytest.mark.parametrize("place", ["column", "message"])
def test_rows_reach_no_file_and_no_server_without_a_flag(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, jsonl: Write, tmp_path: Path, place: str
) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(make_row(1)["images"][0]["bytes"])

    def row(source: Any) -> dict[str, Any]:
        if place == "column":
            return {"problem": "q", "answer": "1", "images": [source]}
        part = {"type": "image", "image": source}
        return {"problem": [{"role": "user", "content": [part]}], "answer": "1", "images": []}

    sources = [
        str(outside),
        outside.as_uri(),
        "../outside.png",
        {"path": str(outside)},
        "http://127.0.0.1:9/a",
    ]
    path = jsonl([row(source) for source in sources], "data/train.jsonl")
    for number, source in enumerate(sources):
        refused = PromptSource(make_args(f"{path}@[{number}:]"), processor, PictureStore())
        with pytest.raises(BadRow, match=r"--image-root|--allow-remote-images"):
            refused.next_groups(1)
        if isinstance(source, dict) or not source.startswith(("..", "http")):
            args = make_args(f"{path}@[{number}:]", "--image-root", str(tmp_path))
            ((sample, _),) = PromptSource(args, processor, PictureStore()).next_groups(1)
            assert len((sample.multimodal_train_inputs or {})["image_hashes"]) == 1


BAD_PICTURES = {
    "unreadable": [{"bytes": b"no picture", "path": None}],
    "null": [{"bytes": None, "path": None}],
    "missing file": [{"bytes": None, "path": "nowhere.png"}],
}


@pytest.mark.parametrize("pictures", BAD_PICTURES.values(), ids=BAD_PICTURES.keys())
def test_bad_picture_is_refused_when_its_turn_comes(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write, pictures: list[Any]
) -> None:
    path = parquet([make_row(0), make_row(1, images=pictures)])
    source = PromptSource(make_args(path), processor, PictureStore())
    assert rows_of(source, 1) == [1]
    with pytest.raises(BadRow, match=r"train.parquet, row 2: picture 1: "):
        source.next_groups(1)


def test_skipped_rows_are_counted_and_replaced_by_the_next_good_ones(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    rows = [make_row(number) for number in range(5)]
    rows[1]["problem"] = None
    rows[3]["images"] = [{"bytes": b"no picture", "path": None}]
    source = PromptSource(make_args(parquet(rows), "--bad-rows", "skip"), processor, PictureStore())
    groups = source.next_groups(4)
    assert [group[0].metadata["data_row"] for group in groups] == [1, 3, 5, 1]
    assert [sample.index for group in groups for sample in group] == list(range(8))
    assert source.bad_rows == 2


def test_data_without_a_good_row_ends_with_an_error(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    broken = [make_row(number, images=[{"bytes": b"x", "path": None}]) for number in range(3)]
    source = PromptSource(make_args(parquet(broken), "--bad-rows", "skip"), processor, PictureStore())
    with pytest.raises(DataError, match=r"no row of .* can be used; the last one: .*row 3"):
        source.next_groups(1)
    empty = [make_row(number, problem=" ") for number in range(3)]
    with pytest.raises(DataError, match=r"no row of .* can be used; the first one: .*row 1"):
        PromptSource(make_args(parquet(empty), "--bad-rows", "skip"), processor, PictureStore())


def test_prompt_limit_counts_picture_tokens(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path = parquet([make_row(0)])
    sample = PromptSource(make_args(path), processor, PictureStore()).next_groups(1)[0][0]
    assert sample.multimodal_train_inputs is not None
    expanded = expand_image_pads(
        sample.tokens, sample.multimodal_train_inputs["image_grid_thw"], processor.image_token_id, 2
    )
    assert len(expanded) > len(sample.tokens)
    fits = make_args(path, "--rollout-max-prompt-len", str(len(expanded)))
    assert rows_of(PromptSource(fits, processor, PictureStore()), 1) == [1]
    tight = make_args(path, "--rollout-max-prompt-len", str(len(expanded) - 1))
    with pytest.raises(BadRow, match=f"row 1: the prompt has {len(expanded)} tokens"):
        PromptSource(tight, processor, PictureStore()).next_groups(1)


@pytest.mark.parametrize("flag", ["--input-key", "--label-key", "--multimodal-keys"])
def test_column_that_no_row_has_is_the_flags_fault(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write, flag: str
) -> None:
    value = '{"image": "pics"}' if flag == "--multimodal-keys" else "pics"
    with pytest.raises(
        DataError, match=f"no column 'pics', which {flag} names; it has problem, answer, images"
    ):
        PromptSource(make_args(parquet([make_row(0)]), flag, value), processor, PictureStore())


def test_column_that_a_line_lacks_is_a_bad_row(processor: Any, make_args: MakeArgs, jsonl: Write) -> None:
    good = {"problem": "q", "answer": "1", "images": []}
    for column in good:
        lacking = {key: value for key, value in good.items() if key != column}
        with pytest.raises(BadRow, match=f"row 2: no column '{column}'"):
            PromptSource(make_args(jsonl([good, lacking])), processor, PictureStore())


def test_text_model_refuses_pictures(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    class Textual:
        tokenizer, chat_template = processor.tokenizer, processor.chat_template
        image_token_id, image_processor = processor.image_token_id, None

    with pytest.raises(BadRow, match="no vision part; pass --multimodal-keys"):
        PromptSource(make_args(parquet([make_row(0)])), Textual(), PictureStore())


def test_eval_set_is_every_row_in_order_and_fresh_each_time(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path = parquet([make_row(number) for number in range(3)], "test.parquet")
    args = make_args(
        path, "--n-samples-per-eval-prompt", "2", "--eval-temperature", "0.5", "--rollout-shuffle"
    )
    held_out = EvalSet("geo", path, args, processor, PictureStore())
    samples = held_out.samples()
    assert [(s.index, s.group_index, s.metadata["data_row"]) for s in samples] == [
        (0, 0, 1), (1, 0, 1), (2, 1, 2), (3, 1, 2), (4, 2, 3), (5, 2, 3),
    ]  # fmt: skip
    samples[0].tokens.append(7)
    assert held_out.samples()[0].tokens != samples[0].tokens


def test_eval_set_skips_or_refuses_bad_rows(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    rows = [make_row(number) for number in range(3)]
    rows[1]["images"] = [{"bytes": b"x", "path": None}]
    path = parquet(rows, "test.parquet")
    with pytest.raises(BadRow, match=r"test.parquet, row 2: picture 1"):
        EvalSet("geo", path, make_args(path), processor, PictureStore()).samples()
    held_out = EvalSet("geo", path, make_args(path, "--bad-rows", "skip"), processor, PictureStore())
    assert [sample.metadata["data_row"] for sample in held_out.samples()] == [1, 3]
    assert held_out.bad_rows == 1
    held_out.samples()
    assert held_out.bad_rows == 1


def test_blank_pictures_keep_their_place_and_size(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    path = parquet([make_row(0)], "test.parquet")
    (seen,) = EvalSet("geo", path, make_args(path), processor, PictureStore()).samples()
    (blank,) = EvalSet(
        "geo", path, make_args(path, "--eval-blank-images"), processor, PictureStore()
    ).samples()
    assert blank.tokens == seen.tokens
    assert blank.multimodal_inputs is not None
    assert seen.multimodal_inputs is not None
    assert blank.multimodal_inputs["images"][0].size == seen.multimodal_inputs["images"][0].size
    assert blank.multimodal_inputs["images"][0].getextrema() == ((255, 255),) * 3


def test_bad_row_crosses_process_borders() -> None:
    import pickle

    copied = pickle.loads(pickle.dumps(BadRow("a.parquet", 3, "why")))
    assert (copied.file, copied.row, copied.why, str(copied)) == (
        "a.parquet",
        3,
        "why",
        "a.parquet, row 3: why",
    )


def test_a_row_that_no_teacher_scores_is_refused_at_the_start(
    processor: Any, make_args: MakeArgs, make_row: MakeRow, parquet: Write
) -> None:
    rows = [make_row(number, metadata={"subject": ("algebra", "music")[number]}) for number in range(2)]
    teachers = ("--opd-teachers", "algebra=http://127.0.0.1:9/generate", "--opd-teacher-key", "subject")
    distil = ("--use-opd", "--opd-type", "sglang", *teachers)
    with pytest.raises(DataError, match=r"row 2: subject is 'music'.*names algebra"):
        PromptSource(make_args(parquet(rows), *distil), processor, PictureStore())
