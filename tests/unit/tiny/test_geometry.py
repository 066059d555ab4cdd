"""The geometry set: same bytes for the same seed, no shared picture, geo3k's schema, answers that follow."""

import io
import random
import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from slime.tiny.geometry import GEOMETRY
from slime.tiny.kinds import KINDS, NUMBERS, solve
from slime.tiny.problems import SPLIT_SIZES, Problem
from slime.tiny.shapes import CELL, SIDE, random_figure, render


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Problem]]:
    return GEOMETRY.make_splits()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return GEOMETRY.write_splits(tmp_path_factory.mktemp("data"))


def test_splits_have_their_sizes_and_test_is_large_enough(
    splits: dict[str, list[Problem]],
) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == SPLIT_SIZES
    assert len(splits["test"]) >= 500


def test_no_rendered_picture_occurs_twice(splits: dict[str, list[Problem]]) -> None:
    pictures = [pixels(row) for rows in splits.values() for row in rows]
    assert len(set(pictures)) == len(pictures)


def test_every_pair_of_numbers_occurs_with_every_kind_of_question_in_train(
    splits: dict[str, list[Problem]],
) -> None:
    seen = {(row.kind, row.a, row.b) for row in splits["train"]}
    assert len(seen) == len(KINDS) * len(NUMBERS) ** 2


def test_questions_give_no_number_away(splits: dict[str, list[Problem]]) -> None:
    texts = {row.text for rows in splits.values() for row in rows}
    assert not [text for text in texts if re.search(r"\d", text)]
    assert all(text.count("<image>") == 1 for text in texts)


def test_one_answer_for_each_question_text_is_seldom_right(splits: dict[str, list[Problem]]) -> None:
    """Guessing the commonest answer of a question, learned from train, stays far below the limit of 0.15."""
    answers: dict[str, list[str]] = {}
    for row in splits["train"]:
        answers.setdefault(row.text, []).append(row.answer)
    guess = {text: max(set(given), key=given.count) for text, given in answers.items()}
    right = sum(guess[row.text] == row.answer for row in splits["test"])
    assert right / len(splits["test"]) < 0.12


def test_a_seed_gives_the_same_bytes_and_another_seed_gives_others(
    files: dict[str, Path], tmp_path: Path
) -> None:
    again = GEOMETRY.write_splits(tmp_path / "again")
    assert {name: path.read_bytes() for name, path in files.items()} == {
        name: path.read_bytes() for name, path in again.items()
    }
    first, second = (next(GEOMETRY.stream(random.Random(seed), set())) for seed in (1, 2))
    assert first.key != second.key


def test_parquet_has_the_schema_of_geo3k(files: dict[str, Path], splits: dict[str, list[Problem]]) -> None:
    table = pq.read_table(files["test"])
    assert table.column_names == ["problem", "answer", "images", "solution"]
    assert table.schema.metadata[b"slime.tiny"] == GEOMETRY.stamp().encode()
    for row, problem in zip(table.to_pylist()[:20], splits["test"], strict=False):
        assert (row["problem"], row["answer"]) == (problem.text, problem.answer)
        [picture] = row["images"]
        assert Image.open(io.BytesIO(picture["bytes"])).tobytes() == pixels(problem)


def test_the_datasets_library_reads_the_files(files: dict[str, Path]) -> None:
    from datasets import Features, List, Value, load_dataset
    from datasets import Image as ImageFeature

    features = Features(
        problem=Value("string"), answer=Value("string"), images=List(ImageFeature()), solution=Value("string")
    )
    rows = load_dataset(
        "parquet",
        data_files=str(files["validation"]),
        split="train",
        features=features,
        cache_dir=str(files["test"].parent / "cache"),
    )
    assert len(rows) == SPLIT_SIZES["validation"]
    assert rows[0]["images"][0].size == (SIDE, SIDE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.shape} {kind.quantity}")
def test_solutions_compute_what_geometry_says(kind: object, splits: dict[str, list[Problem]]) -> None:
    rows = [row for row in splits["test"] if row.kind == kind]
    assert rows
    for row in rows:
        a, b = row.a, row.b
        expected = {
            ("rectangle", "area"): a * b,
            ("parallelogram", "area"): a * b,
            ("right triangle", "area"): a * b / 2,
            ("rhombus", "area"): a * b / 2,
            ("rectangle", "perimeter"): a + b + a + b,
            ("parallelogram", "perimeter"): a + b + a + b,
        }[row.kind.shape, row.kind.quantity]
        assert float(row.answer) == expected
        assert row.solution.endswith(f"</think>Answer: \\boxed{{{row.answer}}}")
        for equation in _equations(row.solution):
            assert len({eval(side) for side in equation}) == 1, row.solution


def test_the_habit_forgets_the_last_step_where_there_is_one(splits: dict[str, list[Problem]]) -> None:
    rows = splits["test"]
    habits = [solve(row.kind, row.a, row.b, forget_last_step=True) for row in rows]
    kept = [row.kind.last == "" for row in rows]
    assert [habit == row.solution for habit, row in zip(habits, rows, strict=True)] == kept
    assert 0.25 < sum(kept) / len(kept) < 0.4
    for habit in habits:
        for equation in _equations(habit):
            assert len({eval(side) for side in equation}) == 1, habit


def test_digits_fill_whole_patches_and_the_outline_touches_none() -> None:
    """Another number changes pixels in its own patches only."""
    rng = random.Random(0)
    for kind in KINDS * 5:
        across, up = rng.randrange(1, 10), rng.randrange(1, 10)
        figure = random_figure(rng, kind.shape, across, up, dashed=kind.quantity == "area")
        old, new = render(figure), render(replace(figure, across=across % 9 + 1, up=up % 9 + 1))
        changed = {
            (x // CELL, y // CELL)
            for x in range(SIDE)
            for y in range(SIDE)
            if old.getpixel((x, y)) != new.getpixel((x, y))
        }
        assert changed == {(figure.column, SIDE // CELL - 1), (1, figure.row)}


def pixels(row: Problem) -> bytes:
    assert row.image is not None
    return row.image.tobytes()


def _equations(solution: str) -> list[list[str]]:
    """Return the sides of each chain of equations in a solution's thought."""
    thought = solution.removeprefix("<think>").split("</think>")[0]
    return [part.split("=") for part in re.split("[.,] ", thought) if "=" in part]
