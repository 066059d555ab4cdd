"""The set in words: no shared question, dapo-math-17k's schema, both numbers in every question."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from slime.tiny.kinds import KINDS, NUMBERS
from slime.tiny.problems import SPLIT_SIZES, Problem
from slime.tiny.tokenizer import build_tokenizer
from slime.tiny.words import WORDS


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Problem]]:
    return WORDS.make_splits()


def test_no_question_occurs_twice(splits: dict[str, list[Problem]]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == SPLIT_SIZES
    questions = [row.text for rows in splits.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_every_pair_of_numbers_occurs_with_every_kind_of_question_in_train(
    splits: dict[str, list[Problem]],
) -> None:
    assert len({(row.kind, row.a, row.b) for row in splits["train"]}) == len(KINDS) * len(NUMBERS) ** 2


def test_a_question_names_shape_and_quantity_and_each_number_with_its_noun(
    splits: dict[str, list[Problem]],
) -> None:
    for row in splits["test"]:
        assert row.kind.shape in row.text
        assert row.kind.quantity in row.text
        assert sorted(map(int, re.findall(r"\d+", row.text))) == sorted((row.a, row.b))
        nouns = re.findall(r"[a-z]+", row.kind.names)
        if len(nouns) == 1:
            assert re.search(rf"{nouns[0]}.* {row.a} and {row.b}\b", row.text)
        else:
            for noun, number in zip(nouns, (row.a, row.b), strict=True):
                assert re.search(rf"{noun}( of a {row.kind.shape} is| of it is)? {number}\b", row.text)


def test_the_tokenizer_knows_every_question(
    splits: dict[str, list[Problem]],
) -> None:
    tokenizer = build_tokenizer()
    for row in splits["validation"]:
        ids = tokenizer(row.text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == row.text


def test_the_files_repeat_and_have_messages_and_labels(
    splits: dict[str, list[Problem]], tmp_path: Path
) -> None:
    first, again = (WORDS.write_splits(tmp_path / name) for name in ("first", "again"))
    assert [path.read_bytes() for path in first.values()] == [path.read_bytes() for path in again.values()]
    table = pq.read_table(first["test"])
    assert table.schema.metadata[b"slime.tiny"] == WORDS.stamp().encode()
    for row, problem in zip(table.to_pylist(), splits["test"], strict=True):
        assert row["prompt"] == [{"role": "user", "content": problem.text}]
        assert (row["label"], row["solution"]) == (problem.answer, problem.solution)
