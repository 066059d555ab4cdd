"""Is there anything to learn? Teacher and student of the same weights have a KL of nothing.

A small student is run here, on the CPU, over responses that the teacher sampled; of a large one the weight
files are compared.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from slime.engines.doctor.files import fingerprint, weight_files
from slime.engines.doctor.material import Material, Picture
from slime.engines.doctor.outcome import Finding
from slime.engines.doctor.receipt import Probe
from slime.engines.doctor.state import State

SMALL_BYTES = 64 * 2**20
SAME_KL = 1e-3
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)
"""What transformers raises on a checkpoint that it cannot use."""
_LOADING = Lock()
NOTHING = "choose another teacher or student; with these every step is zero"


async def same_model(state: State) -> Finding:
    """KL of teacher and student over tokens that the teacher sampled, or their files compared."""
    if not state.with_student:
        return Finding("no --student-path", skipped=True)
    ours = weight_files(state.own.checkpoint)
    size = sum(path.stat().st_size for path in ours)
    if ours and size <= SMALL_BYTES and state.samples:
        return await _by_kl(state)
    theirs = weight_files(state.files.path) if state.files else []
    if ours and theirs:
        same = await asyncio.to_thread(lambda: fingerprint(ours) == fingerprint(theirs))
        if same:
            return Finding("the weight files are the same", warning="same-weights", remedy=NOTHING)
        return Finding(f"the weight files differ; KL not measured: the student has {size / 2**30:.1f} GiB")
    if state.own.checkpoint == state.model_info.get("model_path"):
        return Finding("teacher and student have one name", warning="same-weights", remedy=NOTHING)
    return Finding(
        "not compared: the names differ, and the weight files of "
        + ("the teacher" if ours else "the student")
        + " are not here",
        skipped=True,
    )


async def _by_kl(state: State) -> Finding:
    pictures = [state.picture] if state.picture else []
    probes = [probe for probe, _ in state.samples]
    try:
        student = await asyncio.to_thread(local_log_probs, state.own, pictures, probes)
    except LOAD_ERRORS as error:
        return Finding(
            f"the student cannot be run here: {type(error).__name__}: {str(error)[:200]}",
            warning="student-unrun",
            remedy="see that --student-path loads with transformers",
        )
    teacher = [value for _, log_probs in state.samples for value in log_probs]
    kl = kl_estimate(teacher, student)
    seen = f"KL(teacher, student) is {kl:.2g} over {len(teacher)} tokens that the teacher sampled"
    if kl < SAME_KL:
        return Finding(
            f"{seen}: they are the same model", warning="same-weights", remedy=NOTHING, values={"kl": kl}
        )
    return Finding(seen, values={"kl": kl})


def kl_estimate(teacher: Sequence[float], student: Sequence[float]) -> float:
    """Return the mean of r - 1 - log r, r = p_student / p_teacher, over the teacher's tokens; 0 or more."""
    ratios = [s - t for t, s in zip(teacher, student, strict=True)]
    return sum(math.expm1(min(ratio, 80.0)) - ratio for ratio in ratios) / len(ratios)


@lru_cache(maxsize=1)
def _student(checkpoint: str, sees: bool) -> Any:
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.no_grad()
def local_log_probs(material: Material, pictures: Sequence[Picture], probes: Sequence[Probe]) -> list[float]:
    """Return the student's log-probs of all responses, one after the other, by transformers in float32."""
    # One at a time: while transformers loads a model it switches the tying of weights off for the whole
    # process, and two loads that overlap (a thread for each of several teachers) leave it off for good.
    with _LOADING:
        model = _student(material.checkpoint, material.sees)
    images = [picture.image for picture in pictures]
    prompt = material.processor(
        text=[material.render(len(pictures))], images=images or None, return_tensors="pt"
    )
    values: list[float] = []
    for probe in probes:
        response = torch.tensor([probe.response])
        ids = torch.cat([prompt["input_ids"], response], dim=1)
        inputs = {key: prompt[key] for key in ("pixel_values", "image_grid_thw") if key in prompt}
        if material.sees:
            inputs["mm_token_type_ids"] = (ids == material.facts.image_token_id).long()
        logits = model(input_ids=ids, **inputs).logits[0, -response.shape[1] - 1 : -1]
        scores = logits.log_softmax(-1).gather(-1, response[0, :, None])[:, 0]
        values += scores.tolist()
    return values
