"""Is the server there, is it the right kind of model, and how was it started?"""

from __future__ import annotations

from typing import Any

from slime.engines.doctor.files import read_checkpoint
from slime.engines.doctor.material import Material
from slime.engines.doctor.outcome import Fault, Finding
from slime.engines.doctor.state import Options, State
from slime.engines.doctor.teacher import START_REMEDY, html_page, unauthorized


async def reachable(state: State) -> Finding:
    """The server answers, and says that it is ready."""
    page = await state.teacher.page("/ready")
    if page.status == 404 and not page.is_html:  # servers older than /ready
        page = await state.teacher.page("/health")
    if page.status in (401, 403):
        raise unauthorized(page.url, page.status)
    if page.is_html:
        raise html_page(page.url, page.status)
    if page.status == 503 and (await state.teacher.page("/model_info")).status == 200:
        raise Fault(
            "paused",
            f"{page.url} answered HTTP 503 though the model is loaded: generation is paused or broken",
            "POST /continue_generation, or restart the teacher; see its log",
        )
    if page.status != 200:
        raise Fault(
            "not-ready",
            f"{page.url} answered HTTP {page.status}: it is still loading, or broken",
            "wait until it is loaded; see its log",
        )
    return Finding(f"ready, {page.seconds * 1000:.0f} ms", values={"seconds": page.seconds})


async def model(state: State) -> Finding:
    """It serves a generating model that sees, where the run needs that."""
    state.model_info = (await state.teacher.page("/model_info")).json()
    state.server_info = await _optional(state, "/server_info")
    state.context = await _context_length(state)
    info = state.model_info
    if info.get("is_generation") is False:
        raise Fault(
            "not-generative",
            f"{info.get('model_path')} is served as an embedding or reward model, which gives no log-probs",
            START_REMEDY + ": a causal language model, without --is-embedding",
        )
    path = state.options.teacher_path or str(info.get("tokenizer_path") or info.get("model_path"))
    state.files = read_checkpoint(path)
    if state.material is None:
        if state.files is None:
            raise Fault(
                "no-checkpoint",
                f"the teacher's checkpoint {path!r} cannot be read here, so there is no tokenizer for probes",
                "give --student-path, or --teacher-path where the teacher's files lie",
            )
        state.material = _teachers_own(path, state.options)
    sees = info.get("has_image_understanding")
    wanted = state.own.sees and not state.options.text_only
    if wanted and sees is False and state.with_student:
        raise Fault(
            "text-only-teacher",
            f"{info.get('model_path')} is served without image understanding, and the student sees",
            "serve a vision-language teacher; --text-only if no prompt has a picture",
        )
    state.pictures = wanted and sees is not False
    seeing = "sees" if sees else "does not see" if sees is False else "does not say whether it sees"
    return Finding(
        f"{info.get('model_path')} ({info.get('model_type')}), {seeing}, "
        f"weights {info.get('weight_version')!r}",
        values={"model_path": info.get("model_path"), "weight_version": info.get("weight_version")},
    )


def _teachers_own(path: str, options: Options) -> Material:
    """Return probes made of the teacher's checkpoint, where there is no student's."""
    try:
        return Material(path, options.min_pixels, options.max_pixels)
    except (OSError, ValueError) as error:
        raise Fault("no-checkpoint", f"{path}: {error}", "give --student-path") from error


async def _optional(state: State, path: str) -> dict[str, Any]:
    """Return a page that a server need not have; nothing where it is no JSON object."""
    page = await state.teacher.page(path)
    try:
        return page.json()
    except Fault:
        return {}


async def _context_length(state: State) -> int | None:
    """Return the context length that the server names: `/v1/models` has it resolved, `/server_info` may."""
    models = (await _optional(state, "/v1/models")).get("data")
    if isinstance(models, list) and models and isinstance(models[0], dict):
        length = models[0].get("max_model_len")
        if isinstance(length, int):
            return length
    length = state.server_info.get("context_length")
    return length if isinstance(length, int) else None


async def settings(state: State) -> Finding:
    """Start-up settings that spoil scores."""
    info = state.server_info
    if not info:
        return Finding(
            "/server_info gives nothing",
            warning="settings-unknown",
            remedy="make sure that it runs without --allow-auto-truncate",
        )
    if info.get("allow_auto_truncate"):
        raise Fault(
            "truncates",
            "the server runs with --allow-auto-truncate: it cuts long samples silently and scores the rest",
            "start it without --allow-auto-truncate",
        )
    if info.get("speculative_algorithm"):
        return Finding(
            f"speculative decoding is on ({info['speculative_algorithm']}): scoring then samples tokens, too",
            warning="speculative",
            remedy="start the teacher without --speculative-algorithm",
        )
    if info.get("enable_fp32_lm_head") is False and info.get("dtype") not in ("float32", "float"):
        return Finding(
            f"the head's dtype is {info.get('dtype')!r}: in bfloat16 log-probs have steps of up to 0.125",
            warning="coarse-log-probs",
            remedy="start the teacher with --enable-fp32-lm-head",
        )
    return Finding("nothing that spoils scores")
