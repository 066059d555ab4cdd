"""Random tiny checkpoints and samples for training tests: a Qwen3-VL with pictures, and a text-only Qwen3."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from slime.backends.fsdp.export import hf_named_parameters
from slime.tiny.model import build_config, save_processor
from slime.tiny.paths import checkpoint_path
from slime.tiny.tokenizer import build_tokenizer
from slime.utils.types import Sample, SampleStatus

VOCABULARY = 131
"""No other size in the model is this number, so a tensor of logits gives itself away."""
SIDES = ((64, 64), (96, 64), (64, 96))
"""Heights and widths of the pictures: multiples of 32, so no processor resizes them."""


def save_vision_model(folder: Path, *, tied: bool = True, ffn: int | None = None, seed: int = 0) -> Path:
    """Write a float32 Qwen3-VL with random weights, its MLP as wide as the shipped ones' or `ffn`."""
    config = build_config(build_tokenizer())
    config.tie_word_embeddings = tied
    text = config.get_text_config()
    text.tie_word_embeddings = tied
    text.vocab_size = VOCABULARY
    text.intermediate_size = ffn or text.intermediate_size
    torch.manual_seed(seed)
    Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder)
    save_processor(folder)
    return folder


def save_mixture_model(folder: Path, *, tied: bool = False, published: bool = True, seed: int = 0) -> Path:
    """Write a float32 Qwen3-VL whose layers are mixtures of four experts, with random weights.

    Experts lie as in published checkpoints, or as transformers saves them.
    """
    dense = build_config(build_tokenizer()).to_dict()
    text, vision = ({**dense[part]} for part in ("text_config", "vision_config"))
    del text["model_type"], vision["model_type"]
    text |= {"vocab_size": VOCABULARY, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    text |= {"moe_intermediate_size": 20, "tie_word_embeddings": tied}
    ids = {name: value for name, value in dense.items() if name.endswith("_token_id")}
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
    ).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or name.endswith("mlp.gate.weight"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    if published:
        weights = {name: tensor.contiguous() for name, tensor in hf_named_parameters(model, torch.float32)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_processor(folder)
    return folder


def save_upcycled_student(folder: Path, *, experts: int = 4) -> Path:
    """Write the shipped student as a mixture: every expert is its MLP, so it answers as the student does."""
    shipped = checkpoint_path("student")
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = AutoConfig.from_pretrained(shipped).to_dict()
    text, vision = ({**config[part]} for part in ("text_config", "vision_config"))
    del text["model_type"], vision["model_type"]
    text |= {"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True}
    text |= {"moe_intermediate_size": text["intermediate_size"]}
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    mixture = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    mixture.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    mixture.save_pretrained(folder)
    torch.manual_seed(0)
    dense, weights = load_file(shipped / "model.safetensors"), {}
    for name, tensor in dense.items():
        layer, of_mlp, part = name.rpartition(".mlp.")
        if not of_mlp or "language_model" not in layer:
            weights[name] = tensor
        elif part == "gate_proj.weight":
            gate_and_up = torch.cat([tensor, dense[f"{layer}.mlp.up_proj.weight"]])
            weights[f"{layer}.mlp.experts.gate_up_proj"] = gate_and_up.T.repeat(experts, 1, 1)
            weights[f"{layer}.mlp.gate.weight"] = 0.1 * torch.randn(experts, tensor.shape[1]).bfloat16()
        elif part == "down_proj.weight":
            weights[f"{layer}.mlp.experts.down_proj"] = tensor.T.repeat(experts, 1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_text_model(folder: Path, *, experts: int = 0, seed: int = 0) -> Path:
    """Write a float32 Qwen3 with random weights and the tiny tokenizer; with `experts` a mixture of them."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    if experts:
        chosen = {"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **chosen, moe_intermediate_size=20))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.float().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def make_picture(seed: int) -> tuple[str, bytes, tuple[int, int, int]]:
    """Return content hash, PNG bytes and grid of a random picture."""
    height, width = SIDES[seed % len(SIDES)]
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    png = buffer.getvalue()
    return hashlib.sha256(png).hexdigest(), png, (1, height // 16, width // 16)


def make_samples(
    count: int,
    *,
    with_pictures: Sequence[bool] = (True, False),
    group_size: int = 2,
    seed: int = 0,
    top_k: int = 0,
) -> tuple[list[Sample], dict[str, bytes]]:
    """Return scored and graded samples of mixed lengths, and their pictures by hash.

    `with_pictures` says which groups have one, repeated over the groups. With `top_k` they carry as many of a
    teacher's likeliest tokens.
    """
    ids = build_tokenizer().convert_tokens_to_ids
    ordinary = torch.tensor([ids(letter) for letter in "0123456789*/=+abch"])
    generator = torch.Generator().manual_seed(seed)
    samples, pictures = [], {}
    for index in range(count):
        group = index // group_size
        length = 3 + int(torch.randint(0, 9, (), generator=generator))
        tokens = ordinary[
            torch.randint(0, len(ordinary), (5 + group % 3 + length,), generator=generator)
        ].tolist()
        inputs = None
        if with_pictures[group % len(with_pictures)]:
            sha256, png, grid = make_picture(group)
            pictures[sha256] = png
            inputs = {"image_hashes": [sha256], "image_grid_thw": [grid]}
            marks = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
            tokens = [tokens[0], *(ids(mark) for mark in marks), *tokens[1:]]
        samples.append(
            Sample(
                index=index,
                group_index=group,
                tokens=tokens,
                multimodal_train_inputs=inputs,
                response_length=length,
                loss_mask=[1] * (length - 1) + [index % 2],
                rollout_log_probs=(-torch.rand(length, generator=generator) * 3).tolist(),
                teacher_log_probs=-torch.rand(length, generator=generator) * 3,
                status=SampleStatus.COMPLETED,
                metadata={"train_reward": float(torch.randint(0, 2, (), generator=generator))},
            )
        )
    for sample in samples:
        sample.metadata["task_reward"] = float((sample.index or 0) % 3 == 0)
        if top_k > 0:
            add_top_k(sample, top_k)
    return samples, pictures


def add_top_k(sample: Sample, top_k: int) -> None:
    """Let a sample carry the likeliest tokens of a random teacher."""
    generator = torch.Generator().manual_seed(sample.index or 0)
    logits = 2 * torch.randn(sample.response_length, VOCABULARY, generator=generator)
    values, ids = logits.log_softmax(-1).topk(top_k)
    sample.teacher_top_ids, sample.teacher_top_log_probs = ids.int(), values
    sample.teacher_tail_mass = (1 - values.double().exp().sum(1)).clamp(min=0).float()
