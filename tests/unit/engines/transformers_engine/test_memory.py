"""Released memory is really free, and what comes back is what was there."""

from pathlib import Path

import pytest
import torch

from slime.engines.transformers_engine.memory import TAGS, Memory, OccupationError
from slime.engines.transformers_engine.model import EngineModel
from slime.engines.transformers_engine.stepper import Stepper
from slime.engines.transformers_engine.stopping import StopChecker
from tests.contracts.engine_api.support import MODEL, drawn_picture
from tests.unit.engines.transformers_engine.support import (
    PICTURE_PROMPT,
    load_parts,
    make_job,
    make_prompt,
    save_text_model,
)


def make_memory(path: Path = MODEL) -> tuple[EngineModel, Stepper, Memory]:
    """Build all on a model of its own, since it loses its weights."""
    model = EngineModel(str(path), torch.float32, torch.device("cpu"))
    stepper = Stepper(
        model,
        StopChecker(load_parts()[0]),
        max_running=8,
        max_prefill_tokens=4096,
        max_total_tokens=2**30,
        deterministic=False,
    )
    return model, stepper, Memory(model, stepper)


def logits(model: EngineModel) -> torch.Tensor:
    prompt = make_prompt(PICTURE_PROMPT, [drawn_picture(1)])
    return model.logits(model.prefill([prompt], [[]]).hidden[0])


def test_weights_are_freed_and_come_back_when_written() -> None:
    model, stepper, memory = make_memory()
    before = logits(model)
    stepper.rows.cache.reserve(4, 64)
    weights = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.net.named_buffers()}
    assert any("inv_freq" in name for name in buffers)

    memory.release(TAGS)
    assert sum(parameter.untyped_storage().nbytes() for parameter in model.net.parameters()) == 0
    assert stepper.rows.cache.keys == stepper.rows.cache.values == []
    assert memory.weights_released
    assert stepper.held

    memory.resume(TAGS)
    assert all(bool(parameter.isnan().all()) for parameter in model.net.parameters())
    assert {name: p.shape for name, p in model.net.named_parameters()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    assert not memory.weights_released
    first, *others = weights
    model.write_weights({name: weights[name] for name in others})
    memory.written(others)
    assert f"{first} among them" in str(memory.lacking())
    model.write_weights({first: weights[first]})
    memory.written([first])
    assert memory.lacking() is None
    assert not stepper.held
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in model.net.named_buffers())
    assert torch.equal(logits(model), before)


def test_a_tied_head_comes_back_with_its_embedding(tmp_path: Path) -> None:
    model, _, memory = make_memory(save_text_model(tmp_path / "tied", tied=True))
    weights = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    head = weights.pop("lm_head.weight")
    memory.release(["weights"])
    memory.resume(["weights"])
    model.write_weights(weights)
    memory.written(weights)
    assert memory.lacking() is None
    assert torch.equal(model.net.lm_head.weight, head)


def test_running_rows_keep_everything() -> None:
    model, stepper, memory = make_memory()
    job = make_job(PICTURE_PROMPT, picture=1, max_new_tokens=4)
    job.use_version("v1")
    stepper.waiting.add(job)
    stepper.step()
    with pytest.raises(OccupationError, match="1 requests are running"):
        memory.release(TAGS)
    assert memory.lacking() is None
    while stepper.runnable():
        stepper.step()
    assert len(job.output_ids) == 4
    assert bool(logits(model).isfinite().all())
