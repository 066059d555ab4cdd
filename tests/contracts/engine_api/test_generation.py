"""What a rollout relies on: seeds, stops, bias, batching, streams, aborts, log-probs true when scored."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.contracts.engine_api.support import (
    ENDLESS_TOKENS,
    NO_PADS,
    PROMPT,
    TEXT_PROMPT,
    Engine,
    input_logprobs,
    output_logprobs,
    picture_uri,
    running_request,
)
from tests.fakes.processes import wait_until

CONCURRENT = 128
LONGEST = 50


def sampling(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True, "logit_bias": NO_PADS, **more}


def rollout(index: int, **more: Any) -> dict[str, Any]:
    """Request `index` of a rollout: prompts of several lengths and three pictures, each with its own seed."""
    picture = ("first", "second", "square")[index % 3]
    prompt = PROMPT[:-2] + [60 + index % 40] * (index % 7) + PROMPT[-2:]
    params = sampling(max_new_tokens=LONGEST - index % 9, sampling_seed=index, **more)
    return {
        "input_ids": prompt,
        "image_data": [picture_uri(picture)],
        "sampling_params": params,
        "return_logprob": True,
    }


def test_128_concurrent_requests_share_forwards(own_engine: Engine) -> None:
    before = own_engine.counts()
    # Held until all are there: however long a busy machine takes to send them, they are concurrent.
    own_engine.post("/pause_generation", {"mode": "in_place"})
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(own_engine.generate_many, [rollout(index) for index in range(CONCURRENT)])
        try:
            wait_until(lambda: asked.done() or own_engine.held() == CONCURRENT, "all are there")
        finally:
            own_engine.post("/continue_generation", {})
        answers = asked.result(240)
    after = own_engine.counts()
    assert [len(answer["output_ids"]) for answer in answers] == [LONGEST - i % 9 for i in range(CONCURRENT)]
    assert after["decode_forwards"] - before["decode_forwards"] <= 1.2 * LONGEST
    # Those that decoded in one batch decoded as they would have alone.
    for index in range(0, CONCURRENT, 16):
        alone = own_engine.generate(**rollout(index))
        assert alone["output_ids"] == answers[index]["output_ids"]
        assert output_logprobs(alone) == pytest.approx(output_logprobs(answers[index]), abs=1e-4)


def test_sampled_log_probs_are_those_of_scoring_the_sampled_ids(engine: Engine) -> None:
    requests = [rollout(index) | {"sampling_params": sampling(logit_bias={})} for index in range(6)]
    answers = engine.generate_many(requests)
    pairs = [(r, a) for r, a in zip(requests, answers, strict=True) if not {346, 347} & set(a["output_ids"])]
    assert pairs
    scores = engine.generate_many(
        [
            {
                "input_ids": request["input_ids"] + answer["output_ids"],
                "image_data": request["image_data"],
                "sampling_params": {"max_new_tokens": 0},
                "return_logprob": True,
                "logprob_start_len": answer["meta_info"]["prompt_tokens"] - 1,
            }
            for request, answer in pairs
        ]
    )
    for (_, answer), score in zip(pairs, scores, strict=True):
        first, *rest = input_logprobs(score)
        assert first is None
        assert rest == pytest.approx(output_logprobs(answer), abs=1e-4)
        assert [entry[1] for entry in score["meta_info"]["input_token_logprobs"][1:]] == [
            token if token < 383 else 0 for token in answer["output_ids"]
        ]


def test_concurrent_scores_equal_lone_ones(engine: Engine) -> None:
    bodies = [
        {
            "input_ids": PROMPT + list(range(40, 60 + index)),
            "image_data": [picture_uri(("first", "second")[index % 2])],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": index % 5,
        }
        for index in range(24)
    ]
    together = engine.generate_many(bodies)
    for body, answer in zip(bodies, together, strict=True):
        assert input_logprobs(engine.generate(**body))[1:] == pytest.approx(
            input_logprobs(answer)[1:], abs=1e-4
        )


def test_a_request_joins_a_running_batch(own_engine: Engine) -> None:
    with running_request(own_engine, "long-one") as long:
        answer = own_engine.generate(input_ids=TEXT_PROMPT, sampling_params=sampling(max_new_tokens=4))
        assert len(answer["output_ids"]) == 4
        assert long.abort()["meta_info"]["completion_tokens"] > 4


def test_a_seed_repeats_and_another_differs(own_engine: Engine) -> None:
    def tokens(seed: int) -> list[int]:
        params = sampling(sampling_seed=seed, max_new_tokens=24)
        return own_engine.generate(input_ids=TEXT_PROMPT, sampling_params=params)["output_ids"]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_greedy_is_the_likeliest_token(engine: Engine) -> None:
    answer = engine.generate(
        input_ids=TEXT_PROMPT,
        sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
        return_logprob=True,
        top_logprobs_num=2,
    )
    tops = answer["meta_info"]["output_top_logprobs"]
    assert [row[0][1] for row in tops] == answer["output_ids"]


def test_bias_forces_and_forbids(engine: Engine) -> None:
    forced = sampling(logit_bias={"281": 100.0}, max_new_tokens=3)
    assert engine.generate(input_ids=TEXT_PROMPT, sampling_params=forced)["output_ids"] == [281] * 3
    greedy = sampling(temperature=0, max_new_tokens=1, logit_bias=None)
    best = engine.generate(input_ids=TEXT_PROMPT, sampling_params=greedy)["output_ids"][0]
    without = sampling(temperature=0, max_new_tokens=1, logit_bias={str(best): -100.0})
    assert engine.generate(input_ids=TEXT_PROMPT, sampling_params=without)["output_ids"] != [best]


def test_stop_token_stays_in_the_ids_and_not_in_the_text(engine: Engine) -> None:
    params = {"max_new_tokens": 5, "logit_bias": {"281": 100.0}, "stop_token_ids": [281]}
    answer = engine.generate(input_ids=TEXT_PROMPT, sampling_params=params)
    assert (answer["text"], answer["output_ids"]) == ("", [281])
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 281}


def test_stop_string_ends_one_request_and_not_another(engine: Engine) -> None:
    forced = {"max_new_tokens": 6, "logit_bias": {"72": 100.0}, "ignore_eos": True}  # id 72 reads "i"
    bodies = [
        {"input_ids": TEXT_PROMPT, "sampling_params": forced | {"stop": ["zz", "iii"]}},
        {"input_ids": TEXT_PROMPT, "sampling_params": forced},
        {"input_ids": TEXT_PROMPT, "sampling_params": forced | {"stop": "ii", "no_stop_trim": True}},
    ]
    stopped, free, untrimmed = engine.generate_many(bodies)
    letter = free["text"][0]
    assert free["text"] == letter * 6
    if letter != "i":
        pytest.fail(f"id 72 reads {letter!r}; the test needs it to read 'i'")
    assert (stopped["text"], stopped["output_ids"]) == ("", [72] * 3)
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": "iii"}
    assert (untrimmed["text"], untrimmed["output_ids"]) == ("ii", [72] * 2)


def test_min_new_tokens_holds_the_end_back(engine: Engine) -> None:
    params = {"max_new_tokens": 10, "min_new_tokens": 4, "logit_bias": {"342": 50.0}}
    answer = engine.generate(input_ids=TEXT_PROMPT, sampling_params=params)
    assert len(answer["output_ids"]) == 5
    assert answer["output_ids"][-1] == 342


def test_n_samples_of_a_prompt(engine: Engine) -> None:
    params = sampling(n=3, sampling_seed=5)
    answers = engine.generate(
        input_ids=PROMPT,
        image_data=[[picture_uri("first")]],
        sampling_params=params,
        return_prompt_token_ids=True,
    )
    assert len(answers) == 3
    assert len({answer["meta_info"]["id"] for answer in answers}) == 3
    assert {tuple(answer["prompt_token_ids"]).count(346) for answer in answers} == {6}


def test_a_text_prompt_with_a_picture(engine: Engine) -> None:
    one = engine.generate(
        text="<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hello<|im_end|>\n",
        image_data=picture_uri("first"),
        sampling_params={"max_new_tokens": 0},
        return_prompt_token_ids=True,
    )
    assert one["meta_info"]["image_tokens"] == one["prompt_token_ids"].count(346) == 6


def test_log_probs_with_text(engine: Engine) -> None:
    answer = engine.generate(
        input_ids=TEXT_PROMPT,
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=len(TEXT_PROMPT) - 2,
        return_text_in_logprobs=True,
    )
    assert [entry[2] for entry in answer["meta_info"]["input_token_logprobs"]] == ["<|im_end|>", "\n"]


def test_a_stream_ends_with_the_whole_answer(engine: Engine) -> None:
    body = {
        "input_ids": TEXT_PROMPT,
        "sampling_params": sampling(max_new_tokens=6),
        "return_logprob": True,
        "stream": True,
    }
    status, text = engine.ask("POST", "/generate", body)
    assert status == 200
    *chunks, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    answers = [json.loads(chunk) for chunk in chunks]
    lengths = [len(answer["output_ids"]) for answer in answers]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 6
    assert [a["meta_info"]["finish_reason"] is None for a in answers] == [True] * (len(answers) - 1) + [False]


def test_an_abort_answers_with_what_there_is(engine: Engine) -> None:
    with running_request(engine, "to-be-aborted") as request:
        answer = request.abort()
    assert 0 < len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] < ENDLESS_TOKENS
    assert engine.ask("POST", "/abort_request", {"rid": "nobody"})[0] == 200
