"""The three gates of `/generate`: shape, contract, values; and how a body spreads over its prompts."""

import pytest

from slime.engines.transformers_engine.errors import ContractViolation, InvalidValue, MalformedBody
from slime.engines.transformers_engine.request import parse_generate

VOCAB = 100


def parse(**body):
    return parse_generate(body, VOCAB)


@pytest.mark.parametrize(
    "body", ["text", [1], None, {"input_ids": [1.5]}, {"input_ids": 3}, {"input_ids": [[1], 2]}]
)
def test_wrong_shapes_are_malformed(body):
    with pytest.raises(MalformedBody) as caught:
        parse_generate(body, VOCAB)
    assert set(caught.value.body) == {"object", "message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sampling_params", {"max_tokens": 3}, "unknown field `max_tokens`"),
        ("sampling_params", {"seed": 3}, "unknown field `seed`"),
        ("sampling_params", {"max_new_tokens": 1.0}, "floating point `1.0`, expected i64"),
        ("sampling_params", {"ignore_eos": 1}, "integer `1`, expected a boolean"),
        ("sampling_params", {"temperature": "hot"}, 'string "hot", expected f64'),
        ("sampling_params", {"stop": [1]}, "expected a string"),
        ("sampling_params", "none", "expected a map"),
        ("image_data", [{"format": "processor_output"}], "unknown field `format`"),
        ("image_data", 5, "integer `5`"),
        ("return_logprob", "yes", "expected a boolean"),
        ("return_prompt_token_ids", None, "null"),
        ("logprob_start_len", 1.5, "expected i64"),
    ],
)
def test_contract_violations_are_flat_errors(field, value, words):
    with pytest.raises(ContractViolation) as caught:
        parse(input_ids=[1], **{field: value})
    assert words in caught.value.body["error"]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"top_p": 0}, "top_p must be in (0, 1]"),
        ({"top_k": 0}, "top_k must be -1"),
        ({"min_p": 1.5}, "min_p must be in [0, 1]"),
        ({"frequency_penalty": 3}, "frequency_penalty must be in [-2, 2]"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in (0, 2]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1."),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens must be in [0, max_new_tokens(3)]"),
        ({"logit_bias": {"100": 1}}, "keys in [0, 99], got 100"),
        ({"sampling_seed": 2**63}, "sampling_seed"),
        ({"stop": ["x"] * 33}, "at most 32"),
        ({"regex": "a+"}, "use an SGLang server"),
        ({"n": 0}, "n must be at least 1"),
        ({"custom_params": {"wave": "a"}}, "wave_size"),
    ],
)
def test_values_out_of_range_are_refused(params, words):
    with pytest.raises(InvalidValue) as caught:
        parse(input_ids=[1], sampling_params=params)
    assert words in caught.value.body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "Either text, input_ids or input_embeds should be provided."),
        ({"input_ids": []}, "input_ids cannot be empty."),
        (
            {"input_ids": [[1], [2]], "image_data": ["a"]},
            "length of image_data (1) must equal the batch size (2)",
        ),
        ({"input_ids": [1], "image_data": [["a"]]}, "flat list"),
        ({"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 2}]}, "same n"),
        ({"input_ids": [1], "token_ids_logprob": [100]}, "outside the vocabulary"),
        ({"input_ids": [1], "return_logprob": True, "logprob_start_len": -2}, "SGLang server dies"),
        ({"input_ids": [1], "return_flat_raw_top_logprobs_b64": True}, "needs return_flat_raw_top_logprobs"),
        ({"input_ids": [1], "lora_path": "x"}, "lora_path is not supported"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "length of rid"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(body, words):
    with pytest.raises(InvalidValue) as caught:
        parse_generate(body, VOCAB)
    assert words in str(caught.value)


def test_null_means_default_but_for_the_limit():
    params = parse(
        input_ids=[1], sampling_params={"temperature": None, "top_k": None, "max_new_tokens": None}
    )
    assert params.items[0].params.temperature == 1.0
    assert params.items[0].params.top_k == 0
    assert params.items[0].params.max_new_tokens is None
    assert parse(input_ids=[1]).items[0].params.max_new_tokens == 128


def test_a_temperature_of_zero_is_greedy_at_one():
    params = parse(input_ids=[1], sampling_params={"temperature": 0}).items[0].params
    assert params.greedy
    assert params.temperature == 1.0


def test_unknown_top_level_keys_are_ignored():
    assert parse(input_ids=[1], no_such_field=1).items[0].ids == [1]


def test_a_batch_spreads_its_options():
    body = parse(
        input_ids=[[1], [2, 3]],
        image_data=[["a", "b"], None],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}],
        return_logprob=True,
        logprob_start_len=[0, 1],
        top_logprobs_num=2,
        token_ids_logprob=[[1], [2, 3]],
        rid="r",
    )
    first, second = body.items
    assert body.is_list
    assert (first.images, second.images) == (("a", "b"), ())
    assert (first.params.max_new_tokens, second.params.max_new_tokens) == (1, 2)
    assert (first.logprobs.start, second.logprobs.start) == (0, 1)
    assert (first.logprobs.token_ids, second.logprobs.token_ids) == ((1,), (2, 3))
    assert (first.rid, second.rid) == ("r_0", "r_1")


def test_n_makes_a_list_of_copies_with_fresh_ids():
    body = parse(input_ids=[1], rid="r", sampling_params={"n": 3}, image_data=[["a", "b"]])
    assert body.is_list
    assert [item.copy for item in body.items] == [0, 1, 2]
    assert {item.prompt_index for item in body.items} == {0}
    assert {item.images for item in body.items} == {("a", "b")}
    assert len({item.rid for item in body.items} | {"r"}) == 4


def test_media_objects_and_nulls():
    body = parse(input_ids=[1], image_data=[{"url": "u", "detail": "low"}, None])
    assert body.items[0].images == ("u",)
