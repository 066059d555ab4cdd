"""The engine under test: ours, a real SGLang server (marker `sglang`), or one that runs already.

`SLIME_TEST_ENGINE_URL` names a running server of `model_a` in float32; its control key, if any, comes by
`SLIME_TEST_ENGINE_ADMIN_KEY`.
"""

import os
from collections.abc import Iterator

import pytest

from slime.engines.process import free_port, start_server
from tests.contracts.engine_api.support import MODEL, Engine, load_exchanges

START_SECONDS = {"transformers": 300, "sglang": 500}
GIVEN_URL = os.environ.get("SLIME_TEST_ENGINE_URL")
KINDS = ["url"] if GIVEN_URL else ["transformers", pytest.param("sglang", marks=pytest.mark.sglang)]


@pytest.fixture(scope="session", params=KINDS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Start the server once for all tests of its kind, on the recorded checkpoint."""
    if request.param == "url":
        assert GIVEN_URL is not None
        yield Engine("url", GIVEN_URL, os.environ.get("SLIME_TEST_ENGINE_ADMIN_KEY"))
        return
    log = tmp_path_factory.mktemp("engine") / f"{request.param}.log"
    with start_server(request.param, str(MODEL), free_port(), log, dtype="float32") as server:
        server.wait_ready(START_SECONDS[request.param])
        yield Engine(request.param, server.url, server.admin_key)


@pytest.fixture
def own_engine(engine: Engine) -> Engine:
    """Only our engine: for what the real server does not tell, promise or survive."""
    if engine.kind != "transformers":
        pytest.skip("holds for the transformers engine alone")
    return engine


@pytest.fixture(scope="session")
def exchanges() -> dict[str, dict]:
    """The recorded requests and answers by name."""
    return load_exchanges()
