"""The engine's forwards against transformers' own, and weights that are read, refused and written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from slime.engines.transformers_engine.model import EngineModel
from slime.engines.transformers_engine.prompt import VisionTokens, build_prompt
from tests.contracts.engine_api.support import MODEL, drawn_picture, save_changed_model
from tests.unit.engines.transformers_engine.support import (
    PICTURE_PROMPT,
    TEXT_PROMPT,
    load_model,
    make_job,
    make_prompt,
    make_stepper,
    run,
    save_text_model,
)


@pytest.fixture(scope="module")
def plain() -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


def plain_logits(plain, prompt) -> torch.Tensor:
    ids = torch.from_numpy(prompt.ids)[None]
    inputs = {}
    if prompt.images:
        inputs = {
            "pixel_values": torch.cat([image.values for image in prompt.images]),
            "image_grid_thw": torch.tensor([image.grid for image in prompt.images]),
            "mm_token_type_ids": torch.from_numpy(prompt.image_mask.astype(np.int64))[None],
        }
    with torch.inference_mode():
        return plain(input_ids=ids, **inputs).logits[0]


def prompts():
    two = [*PICTURE_PROMPT[:6], 198, *PICTURE_PROMPT[3:]]
    return [
        make_prompt(TEXT_PROMPT),
        make_prompt(PICTURE_PROMPT, [drawn_picture(1)]),
        make_prompt(two, [drawn_picture(2), drawn_picture(3, 64, 128)]),
        make_prompt(TEXT_PROMPT * 4),
    ]


def test_a_padded_prefill_equals_transformers(plain):
    model, batch = load_model(), prompts()
    result = model.prefill(batch, [[] for _ in batch])
    for row, prompt in enumerate(batch):
        logits = model.logits(result.hidden[row, : prompt.length])
        torch.testing.assert_close(logits, plain_logits(plain, prompt), atol=2e-5, rtol=0)


def test_positions_are_those_of_transformers(plain):
    for prompt in prompts():
        positions, delta = plain.model.get_rope_index(
            input_ids=torch.from_numpy(prompt.ids)[None],
            mm_token_type_ids=torch.from_numpy(prompt.image_mask.astype(np.int64))[None],
            image_grid_thw=torch.tensor([image.grid for image in prompt.images]),
        )
        assert positions[:, 0].tolist() == prompt.positions.tolist()
        assert prompt.next_position == prompt.length + int(delta)


def test_greedy_decoding_follows_transformers(plain):
    job = make_job(PICTURE_PROMPT, picture=1, max_new_tokens=12, temperature=0, logit_bias={"346": -100})
    run(make_stepper(), [job])
    prompt = make_prompt(PICTURE_PROMPT, [drawn_picture(1)])
    for step, token in enumerate(job.output_ids):
        grown = make_prompt(PICTURE_PROMPT + job.output_ids[:step], [drawn_picture(1)])
        log_probs = plain_logits(plain, grown)[-1].clone()
        log_probs[346] -= 100
        assert int(log_probs.argmax()) == token
        assert job.output.values[step] == pytest.approx(float(log_probs.log_softmax(-1)[token]), abs=1e-4)
    assert prompt.length + 12 == make_prompt(PICTURE_PROMPT + job.output_ids, [drawn_picture(1)]).length


def test_written_weights_are_those_of_the_checkpoint(tmp_path):
    changed = save_changed_model(tmp_path / "changed")
    model = EngineModel(str(MODEL), torch.float32, torch.device("cpu"))
    model.write_weights(model.read_weights(str(changed)))
    fresh = EngineModel(str(changed), torch.float32, torch.device("cpu"))
    prompt = make_prompt(PICTURE_PROMPT, [drawn_picture(1)])
    ours, theirs = (m.logits(m.prefill([prompt], [[]]).hidden[0]) for m in (model, fresh))
    assert torch.equal(ours, theirs)


def test_a_folder_with_weights_alone_is_enough(tmp_path):
    weights = load_file(MODEL / "model.safetensors")
    half = len(weights) // 2
    names = list(weights)
    save_file({name: weights[name] for name in names[:half]}, tmp_path / "model-00001.safetensors")
    save_file({name: weights[name] for name in names[half:]}, tmp_path / "model-00002.safetensors")
    assert load_model().read_weights(str(tmp_path)).keys() == weights.keys()


def test_a_mixture_of_experts_is_served_and_updated(tmp_path):
    torch.manual_seed(0)
    text = load_model().config.text_config.to_dict() | {
        "model_type": "qwen3_vl_moe_text", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    dense = load_model().config
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=dense.vision_config.to_dict() | {"model_type": "qwen3_vl_moe"},
        image_token_id=dense.image_token_id,
        video_token_id=dense.video_token_id,
        vision_start_token_id=dense.vision_start_token_id,
        vision_end_token_id=dense.vision_end_token_id,
    )
    nets = [Qwen3VLMoeForConditionalGeneration(config).eval() for _ in range(2)]
    for index, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(index))
    model = EngineModel(str(tmp_path / "0"), torch.float32, torch.device("cpu"))
    prompt = make_prompt(PICTURE_PROMPT, [drawn_picture(1)])
    for index, net in enumerate(nets):
        # Expert tensors are square here: a missed transposition would raise no error.
        model.write_weights(model.read_weights(str(tmp_path / str(index))))
        logits = model.logits(model.prefill([prompt], [[]]).hidden[0])
        torch.testing.assert_close(logits, plain_logits(net, prompt), atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="/update_weights_from_disk"):
        model.check_part({"lm_head.weight": torch.ones(1)})


@pytest.mark.parametrize("fault", ["missing", "shape", "nothing"])
def test_weights_of_another_model_are_refused(tmp_path, fault):
    weights = load_file(MODEL / "model.safetensors")
    name = "model.language_model.norm.weight"
    if fault == "missing":
        del weights[name]
    if fault == "shape":
        weights[name] = torch.ones(3, dtype=torch.bfloat16)
    if fault != "nothing":
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
        load_model().read_weights(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("experts", "tied"), [(False, False), (False, True), (True, False)])
def test_a_text_model_is_served_and_updated(tmp_path: Path, experts: bool, tied: bool) -> None:
    torch.manual_seed(0)
    folders = [save_text_model(tmp_path / str(number), experts=experts, tied=tied) for number in range(2)]
    model = EngineModel(str(folders[0]), torch.float32, torch.device("cpu"))
    assert (model.sees, model.vocab_size, model.eos_ids) == (False, 90, {7})
    batch = [build_prompt(list(ids), [], VisionTokens.of_text_model(90)) for ids in (range(9), range(50, 80))]
    for folder in folders:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # As a running engine takes weights: by name, into the model that it serves.
        model.write_weights(model.read_weights(str(folder)))
        result = model.prefill(batch, [[], [3, 4]])
        for row, (prompt, extra) in enumerate(zip(batch, ([], [3, 4]), strict=True)):
            ids = torch.tensor([[*prompt.ids.tolist(), *extra]])
            with torch.inference_mode():
                expected = plain(input_ids=ids).logits[0]
            logits = model.logits(result.hidden[row, : ids.shape[1]])
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_a_text_model_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    folder = save_text_model(tmp_path / "model", **window)
    with pytest.raises(ValueError, match=r"sliding window.*SGLang server"):
        EngineModel(str(folder), torch.float32, torch.device("cpu"))
