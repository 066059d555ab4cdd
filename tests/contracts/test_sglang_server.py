"""The real SGLang server on a CPU, as the project starts it, against transformers' own forward pass.

What an engine must answer is pinned by the engine contract tests; here it is whether our way of starting
SGLang gives right numbers, follows a weight update, keeps its keys to itself and leaves nothing behind.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from slime.engines.process import ServerProcess
from tests.contracts.reference import MODEL, TOLERANCE, Http, Reference, picture, running_sglang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

PROMPT = [341, 312, 198, 343, 346, 344, 279, 265, 296, 334, 330, 283, 68, 13, 342, 198, 341, 286, 198]
RESPONSE = [348, 198, 198, 349, 198, 278, 266, 258, 271, 313, 267, 13, 342]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("sglang") / "student.log"
    with running_sglang(MODEL, log, role="student") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Http:
    return Http(server)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL)


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with every weight moved, in the vision tower too."""
    path = tmp_path_factory.mktemp("weights") / "other"
    model = Qwen3VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise, alpha=0.5 * float(weight.std()) if weight.numel() > 1 else 0.1)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    AutoImageProcessor.from_pretrained(MODEL, backend="pil").save_pretrained(path)
    return path


@pytest.mark.parametrize("start", [0, -1], ids=["whole", "from-the-prompt's-end"])
@pytest.mark.parametrize("size", [None, (96, 64), (160, 96)], ids=["text", "small", "large"])
def test_scores_are_those_of_transformers(http, reference, size, start):
    images = [] if size is None else [picture(*size, seed=3)]
    prompt = PROMPT if images else [token for token in PROMPT if token != reference.image_token]
    tokens = [*prompt, *RESPONSE]
    if start == -1:
        pads = 0 if size is None else size[0] * size[1] // 32**2 - 1
        start = len(prompt) + pads - 1
    expected = reference.log_probs(tokens, images, len(RESPONSE))
    torch.testing.assert_close(
        http.score(tokens, images, len(RESPONSE), start), expected, atol=TOLERANCE, rtol=0
    )


def test_two_pictures_are_told_apart(http, reference):
    first, second = picture(96, 64, seed=4), picture(64, 128, seed=5)
    tokens = [*PROMPT[:6], *PROMPT[3:], *RESPONSE]
    for images in ([first, second], [second, first]):
        expected = reference.log_probs(tokens, images, len(RESPONSE))
        torch.testing.assert_close(
            http.score(tokens, images, len(RESPONSE)), expected, atol=TOLERANCE, rtol=0
        )


def test_a_greedy_answer_is_that_of_transformers(http, reference):
    images = [picture(96, 64, seed=6)]
    never = [343, 344, 345, 346, 347]
    bias = {str(token): -100.0 for token in never}
    sampling = {"temperature": 0, "max_new_tokens": 12, "logit_bias": bias, "ignore_eos": True}
    answer = http.generate(PROMPT, images, sampling_params=sampling)
    log_probs = torch.tensor([log_prob for log_prob, _, _ in answer["meta_info"]["output_token_logprobs"]])
    expected_tokens, expected_log_probs = reference.greedy(PROMPT, answer["output_ids"], images, never)
    assert len(expected_tokens) == 12
    assert answer["output_ids"] == expected_tokens
    torch.testing.assert_close(log_probs, expected_log_probs, atol=TOLERANCE, rtol=0)


def test_after_an_update_a_picture_seen_before_is_seen_with_new_eyes(http, reference, other_weights):
    images = [picture(96, 96, seed=7)]
    tokens = [*PROMPT, *RESPONSE]
    other = Reference(other_weights).log_probs(tokens, images, len(RESPONSE))
    before = http.score(tokens, images, len(RESPONSE))
    assert (other - before).abs().max() > 100 * TOLERANCE, "the two checkpoints can hardly be told apart"

    http.update_weights(other_weights, "7")
    try:
        torch.testing.assert_close(http.score(tokens, images, len(RESPONSE)), other, atol=TOLERANCE, rtol=0)
        answer = http.generate(PROMPT, images, sampling_params={"max_new_tokens": 2})
        assert answer["meta_info"]["weight_version"] == "7"
    finally:
        http.update_weights(MODEL, "8")
    torch.testing.assert_close(http.score(tokens, images, len(RESPONSE)), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/flush_cache", None),
        ("/pause_generation", {}),
        ("/update_weights_from_disk", {"model_path": "/nowhere"}),
        ("/abort_request", {"abort_all": True}),
    ],
)
def test_control_needs_the_admin_key(http, path, body):
    for key in (None, "guessed"):
        assert http(path, body, key)[0] == 401


def test_generation_needs_no_key(http):
    assert http.generate(RESPONSE, sampling_params={"max_new_tokens": 1})["output_ids"]


def test_the_admin_key_is_shown_nowhere(http, server):
    key = server.admin_key
    assert key is not None
    status, info = http("/server_info")
    assert status == 200
    assert json.loads(info)["admin_api_key"] == "(set)"
    assert key not in info
    assert key not in server.log_path.read_text(errors="replace")
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(family) > 2
    assert not any(key in word for process in family for word in process.cmdline())
    # The server itself was given the key; the processes that it starts were not.
    assert not any(key in process.environ().values() for process in family[1:])
