"""What an answer may look like, and the cause that is named where it does not."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.engines.doctor.outcome import Fault
from slime.engines.doctor.receipt import Probe, read_scores

PAD = 7
TEXT = Probe(prompt=(1, 2, 3), response=(11, 12, 13, 14), vocab_size=100)
PICTURE = Probe(prompt=(1, PAD, 3), response=(11, 12, 13, 99), images=("u",), image_tokens=6, vocab_size=100)


def good(probe: Probe, start: int | None = None) -> dict[str, Any]:
    """Return what a healthy server answers."""
    start = probe.prompt_length - 1 if start is None else start
    expanded = [token for token in probe.prompt for _ in range(6 if token == PAD and probe.images else 1)]
    ids = [*expanded, *probe.response][start:]
    triples: list[list[Any]] = [
        [-0.1 * place, 0 if id_ in (PAD, 99) else id_, None] for place, id_ in enumerate(ids)
    ]
    triples[0][0] = None
    return {
        "meta_info": {
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": probe.length,
            "image_tokens": probe.image_tokens,
            "cached_tokens": 2,
            "input_token_logprobs": triples,
        }
    }


@pytest.mark.parametrize("probe", [TEXT, PICTURE], ids=["text", "picture"])
@pytest.mark.parametrize("start", [None, 0, 1])
def test_a_good_answer_gives_the_responses_scores(probe: Probe, start: int | None) -> None:
    scores = read_scores(good(probe, start), probe, start)
    first = probe.length - len(probe.response) - (probe.prompt_length - 1 if start is None else start)
    assert scores.log_probs == pytest.approx([-0.1 * (first + place) for place in range(4)])
    assert scores.entries == probe.length - (probe.prompt_length - 1 if start is None else start)
    assert scores.cached_tokens == 2


def test_a_probe_counts_its_pictures_expanded() -> None:
    assert (PICTURE.prompt_length, PICTURE.length) == (8, 12)
    payload = PICTURE.payload(temperature=0.5)
    assert payload["logprob_start_len"] == 7
    assert payload["input_ids"] == [1, PAD, 3, 11, 12, 13, 99]
    assert payload["sampling_params"] == {"max_new_tokens": 0, "temperature": 0.5}


def spoiled(probe: Probe, **changes: Any) -> dict[str, Any]:
    answer = good(probe)
    answer["meta_info"] |= changes
    return answer


def triples(probe: Probe) -> list[list[Any]]:
    return good(probe)["meta_info"]["input_token_logprobs"]


def with_entry(probe: Probe, place: int, entry: Any) -> list[list[Any]]:
    rows = triples(probe)
    rows[place] = entry
    return rows


@pytest.mark.parametrize(
    ("probe", "changes", "name"),
    [
        (TEXT, {"finish_reason": {"type": "abort", "message": "queue"}}, "aborted"),
        (PICTURE, {"image_tokens": 0, "prompt_tokens": 7}, "picture-dropped"),
        (PICTURE, {"image_tokens": None, "prompt_tokens": 6}, "picture-dropped"),
        (PICTURE, {"image_tokens": 4, "prompt_tokens": 10}, "picture-resized"),
        (PICTURE, {"image_tokens": 9, "prompt_tokens": 15}, "picture-resized"),
        (PICTURE, {"image_tokens": 11, "prompt_tokens": 17}, "expanded-twice"),
        (PICTURE, {"image_tokens": 36, "prompt_tokens": 42}, "expanded-twice"),
        (TEXT, {"prompt_tokens": 6, "input_token_logprobs": triples(TEXT)[:-1]}, "truncated"),
        (TEXT, {"prompt_tokens": 5, "input_token_logprobs": [[None, 3, None], [-1, 5, None]]}, "retokenised"),
        (TEXT, {"prompt_tokens": 8}, "retokenised"),
        (TEXT, {"prompt_tokens": None}, "retokenised"),
        (TEXT, {"input_token_logprobs": None}, "unreadable-answer"),
        (TEXT, {"input_token_logprobs": [1, 2]}, "unreadable-answer"),
        (TEXT, {"input_token_logprobs": triples(TEXT)[:2]}, "short-answer"),
        (TEXT, {"input_token_logprobs": triples(TEXT)[1:]}, "off-by-one"),
        (TEXT, {"input_token_logprobs": [*triples(TEXT), [-1.0, 5, None]]}, "off-by-one"),
        (TEXT, {"input_token_logprobs": good(TEXT, 0)["meta_info"]["input_token_logprobs"]}, "start-ignored"),
        (TEXT, {"input_token_logprobs": [[None, 2, None], *triples(TEXT)[:-1]]}, "ids-shifted"),
        (TEXT, {"input_token_logprobs": [*triples(TEXT)[1:], [-1.0, 5, None]]}, "ids-shifted"),
        (TEXT, {"input_token_logprobs": with_entry(TEXT, -1, [-1.0, 0, None])}, "ids-clipped"),
        (TEXT, {"input_token_logprobs": with_entry(TEXT, -1, [-1.0, 55, None])}, "retokenised"),
        (TEXT, {"input_token_logprobs": with_entry(TEXT, -1, [None, 14, None])}, "null-scores"),
        (TEXT, {"input_token_logprobs": with_entry(TEXT, 2, [True, 12, None])}, "null-scores"),
        (TEXT, {"input_token_logprobs": with_entry(TEXT, 2, [0.5, 12, None])}, "null-scores"),
        (TEXT, {"input_token_logprobs": with_entry(TEXT, 0, [-1.0, 3, None])}, "off-by-one"),
    ],
)  # fmt: skip
def test_a_bad_answer_is_named(probe: Probe, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(Fault) as caught:
        read_scores(spoiled(probe, **changes), probe)
    assert caught.value.name == name
    assert caught.value.message
    assert caught.value.remedy


def test_only_the_last_id_may_come_back_as_0() -> None:
    assert read_scores(good(PICTURE), PICTURE).log_probs[-1] < 0
    larger = Probe(PICTURE.prompt, PICTURE.response, PICTURE.images, PICTURE.image_tokens, vocab_size=200)
    with pytest.raises(Fault, match="clipped"):
        read_scores(good(larger), larger)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats(-30, 1) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)
KEYS = ("finish_reason", "prompt_tokens", "image_tokens", "cached_tokens", "input_token_logprobs")


@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON), probe=st.sampled_from([TEXT, PICTURE]))
def test_whatever_a_server_answers_is_scores_or_a_named_fault(changes: dict[str, Any], probe: Probe) -> None:
    with suppress(Fault):
        assert len(read_scores(spoiled(probe, **changes), probe).log_probs) == len(probe.response)


@given(rows=st.lists(st.lists(JSON, min_size=2, max_size=3), min_size=5, max_size=5))
def test_whatever_the_triples_hold_is_scores_or_a_named_fault(rows: list[list[Any]]) -> None:
    with suppress(Fault):
        read_scores(spoiled(TEXT, input_token_logprobs=rows), TEXT)
