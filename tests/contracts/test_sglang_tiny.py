"""The shipped tiny checkpoints on a real SGLang server: the same answers as under transformers."""

from collections.abc import Iterator

import pytest
import torch

from slime.engines.process import ServerProcess
from slime.tiny.examples import Encoder
from slime.tiny.paths import CHECKPOINTS, checkpoint_path
from slime.tiny.problems import Problem, ProblemSet
from slime.tiny.recipe import RECIPES
from tests.contracts.reference import TOLERANCE, Http, Reference, running_sglang

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

MAX_TOKENS = 64


SEEING = tuple(name for name in CHECKPOINTS if not name.startswith("text_"))
TEXT = tuple(name for name in CHECKPOINTS if name.startswith("text_"))


@pytest.fixture(scope="module", params=[SEEING, TEXT], ids=["pictures", "text"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Serve the first of the checkpoints; the weights of the others fit it."""
    log = tmp_path_factory.mktemp("sglang") / "tiny.log"
    with running_sglang(checkpoint_path(request.param[0]), log, role="student") as server:
        yield server


def one_of_each_kind(problems: ProblemSet) -> list[Problem]:
    return list({row.kind: row for row in problems.make_splits()["test"]}.values())


def test_tiny_checkpoints_answer_and_score_as_under_transformers(
    server: ServerProcess, request: pytest.FixtureRequest
) -> None:
    for name in request.node.callspec.params["server"]:
        answers_and_scores_as_under_transformers(Http(server), name)


def answers_and_scores_as_under_transformers(http: Http, name: str) -> None:
    http.update_weights(checkpoint_path(name), name)
    reference, encoder = Reference(checkpoint_path(name)), Encoder(checkpoint_path(name))
    vision = [token for token in encoder.tokenizer.all_special_ids if token != encoder.end_id]
    sampling = {
        "temperature": 0,
        "max_new_tokens": MAX_TOKENS,
        "logit_bias": {str(token): -100.0 for token in vision},
        "skip_special_tokens": False,
    }
    for problem in one_of_each_kind(RECIPES[name].problems):
        prompt = encoder.prompt_ids(problem.text)
        images = [] if problem.image is None else [problem.image]
        answer = http.generate(prompt, images, sampling_params=sampling)
        response = answer["output_ids"]
        expected, log_probs = reference.greedy(prompt, response, images, vision)
        assert response == expected
        assert answer["meta_info"]["finish_reason"]["type"] == "stop"
        assert answer["meta_info"]["weight_version"] == name
        sampled = torch.tensor([log_prob for log_prob, _, _ in answer["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(sampled, log_probs, atol=TOLERANCE, rtol=0)

        whole = [*prompt, *response]
        scored = http.score(whole, images, len(response))
        torch.testing.assert_close(
            scored, reference.log_probs(whole, images, len(response)), atol=TOLERANCE, rtol=0
        )
