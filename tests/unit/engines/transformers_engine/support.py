"""A stepper on the recorded checkpoint, driven without threads or HTTP."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from slime.engines.transformers_engine.__main__ import vision_tokens
from slime.engines.transformers_engine.images import ImageLoader
from slime.engines.transformers_engine.job import Job
from slime.engines.transformers_engine.model import EngineModel
from slime.engines.transformers_engine.prompt import Prompt, VisionTokens, build_prompt
from slime.engines.transformers_engine.request import parse_generate
from slime.engines.transformers_engine.stepper import Stepper
from slime.engines.transformers_engine.stopping import StopChecker
from slime.utils.processing_utils import encode_image_for_rollout_engine, load_processor
from tests.contracts.engine_api.support import MODEL, drawn_picture

PAD = 346
PICTURE_PROMPT = [341, 312, 198, 343, PAD, 344, 279, 265, 296, 13, 342, 198]
TEXT_PROMPT = [341, 312, 198, 281, 284, 327, 258, 342, 198]


@cache
def load_model() -> EngineModel:
    """Load the checkpoint once for all tests; they leave its weights as they are."""
    return EngineModel(str(MODEL), torch.float32, torch.device("cpu"))


@cache
def load_parts() -> tuple[Any, ImageLoader, VisionTokens]:
    """Return tokenizer, image loader and vision ids of the checkpoint."""
    processor = load_processor(str(MODEL))
    tokens = vision_tokens(load_model().config, processor.tokenizer)
    return processor.tokenizer, ImageLoader(processor.image_processor), tokens


def make_prompt(ids: list[int], pictures: Iterable[Image.Image] = ()) -> Prompt:
    """Expand a prompt with pictures."""
    _, loader, tokens = load_parts()
    return build_prompt(ids, [loader.load(encode_image_for_rollout_engine(p)) for p in pictures], tokens)


def make_job(
    ids: list[int], *, picture: int | None = None, name: str = "", body: dict | None = None, **params: Any
) -> Job:
    """Build a job as the HTTP side does; `picture` seeds one, `params` are sampling parameters."""
    model = load_model()
    given = {"input_ids": ids, "sampling_params": {"ignore_eos": True} | params} | (body or {})
    item = parse_generate(given, model.vocab_size).items[0]
    pictures = [] if picture is None else [drawn_picture(picture)]
    eos = () if item.params.ignore_eos else tuple(model.eos_ids)
    return Job(
        rid=name or item.rid,
        prompt=make_prompt(ids, pictures),
        params=item.params,
        logprobs=item.logprobs,
        seed=item.params.sampling_seed or 0,
        stop_ids=(*item.params.stop_token_ids, *eos),
        max_tokens=item.params.max_new_tokens or 0,
        notify=lambda job: None,
    )


def make_stepper(
    *,
    max_running: int = 64,
    max_prefill_tokens: int = 4096,
    max_total_tokens: int = 2**30,
    deterministic: bool = False,
) -> Stepper:
    """Build a stepper on the shared model."""
    return Stepper(
        load_model(),
        StopChecker(load_parts()[0]),
        max_running=max_running,
        max_prefill_tokens=max_prefill_tokens,
        max_total_tokens=max_total_tokens,
        deterministic=deterministic,
    )


def run(stepper: Stepper, jobs: Iterable[Job] = ()) -> int:
    """Hand over jobs and step until nothing is left; return the number of steps."""
    for job in jobs:
        job.use_version("v1")
        stepper.waiting.add(job)
    steps = 0
    while stepper.runnable():
        stepper.step()
        steps += 1
    return steps


def save_text_model(folder: Path, *, experts: bool = False, tied: bool = False, **settings: Any) -> Path:
    """Write a random text-only Qwen3."""
    shape: dict[str, Any] = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.1,
        "eos_token_id": 7, "tie_word_embeddings": tied,
    } | settings  # fmt: skip
    mixture: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    net = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **mixture))
        if experts
        else Qwen3ForCausalLM(Qwen3Config(**shape))
    )
    net.save_pretrained(folder)
    return folder
