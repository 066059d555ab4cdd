"""Do teacher and student mean the same by ids, prompts and pictures?

By the teacher's files where they can be read here, and by what the server does, always.
"""

from __future__ import annotations

from slime.engines.doctor.files import compare_image_processors, compare_templates, compare_vocabularies
from slime.engines.doctor.outcome import Fault, Finding
from slime.engines.doctor.receipt import Probe
from slime.engines.doctor.state import State

TEXT_ROOM = 256
"""Tokens of a probe besides its picture, at most."""
UNREAD = "give --teacher-path where the teacher's checkpoint lies here"


async def vocabulary(state: State) -> Finding:
    """One id, one token. Afterwards only ids that the server itself has produced are sent to it."""
    own, files = state.own, state.files
    if files is not None:
        compare_vocabularies(own, files)
    text = own.vocabulary_text()
    payload = {"text": text, "sampling_params": {"max_new_tokens": 0}, "return_prompt_token_ids": True}
    try:
        theirs = (await state.teacher.ask(payload)).get("prompt_token_ids")
    except Fault as fault:
        if fault.name != "http-400":  # --skip-tokenizer-init: it takes ids alone
            raise
        theirs = None
    ours = own.encode(text)
    if not isinstance(theirs, list):
        state.known_ids = min(len(own.tokenizer), files.facts.vocab_size) if files else max(ours[:64]) + 1
        return Finding(
            "the server does not tokenise text or does not return prompt_token_ids: its tokenizer is unseen"
            + ("; the files agree" if files else " and its files cannot be read here"),
            warning="tokenizer-unseen",
            remedy="ask the server itself (a router may drop return_prompt_token_ids)"
            + ("" if files else "; " + UNREAD),
        )
    if theirs[-len(ours) :] != ours or len(theirs) > len(ours) + 1:  # one more: its own token of beginning
        raise _other_tokens(state, ours, theirs)
    state.known_ids = max(ours) + 1
    seen = f"{len(ours)} ids of a text with all special tokens are the student's, as the server writes them"
    if files is None:
        return Finding(
            f"{seen}; {state.model_info.get('model_path')!r} cannot be read here, so the rest of "
            f"{len(own.tokenizer)} ids was not compared",
            warning="files-unread",
            remedy=UNREAD,
        )
    if not state.with_student:
        return Finding(f"{seen} (the teacher's own: no --student-path)")
    return Finding(f"{len(own.tokenizer)} ids and their special tokens agree; {seen}")


def _other_tokens(state: State, ours: list[int], theirs: list[int]) -> Fault:
    pairs = list(zip(ours, theirs, strict=False))
    place = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    token = state.own.tokenizer.decode(ours[place : place + 1])
    special = ours[place : place + 1] and ours[place] in state.own.tokenizer.added_tokens_decoder
    return Fault(
        "special-tokens-differ" if special else "vocabulary-differs",
        f"the server writes a text as {len(theirs)} ids and the student as {len(ours)}; the first difference "
        f"is at {place}, {token!r}: {theirs[place : place + 1]} and {ours[place : place + 1]}",
        "distil from a teacher with the student's tokenizer",
    )


async def chat_template(state: State) -> Finding:
    """The teacher was trained on the prompts that the student's template writes."""
    if not state.with_student:
        return Finding("no --student-path", skipped=True)
    if state.files is None:
        return Finding("the teacher's files cannot be read here", warning="files-unread", remedy=UNREAD)
    return compare_templates(state.own, state.files)


async def picture_processor(state: State) -> Finding:
    """Both image processors make the same pixels and grids."""
    if not state.pictures:
        return Finding(state.why_no_pictures, skipped=True)
    if not state.with_student:
        return Finding("no --student-path", skipped=True)
    if state.files is None:
        return Finding("the teacher's files cannot be read here", warning="files-unread", remedy=UNREAD)
    if state.files.processor.image_processor is None:
        return Finding("the teacher's files have no image processor", warning="files-unread", remedy=UNREAD)
    return compare_image_processors(state.own, state.files)


async def picture_sizes(state: State) -> Finding:
    """Small, odd and large pictures, prepared on our side, are left alone by the server."""
    if not state.pictures:
        return Finding(state.why_no_pictures, skipped=True)
    response = state.own.response(state.known_ids)[:4]
    limits = [limit for limit in (state.context, state.options.max_tokens) if limit is not None]
    room = min(limits) - TEXT_ROOM if limits else None
    shown: list[str] = []
    for variant, (pixels, ratio) in enumerate(state.own.sizes(room), start=1):
        picture = state.own.picture(pixels, ratio, variant)
        probe: Probe = state.probe([picture], response)
        try:
            await state.score(probe)
        except Fault as fault:
            width, height = picture.image.size
            message = f"a picture of {width}x{height}: {fault.message}"
            raise Fault(fault.name, message, fault.remedy) from fault
        shown.append(f"{picture.image.width}x{picture.image.height} = {picture.tokens}")
    return Finding(f"{', '.join(shown)} tokens, as we count")
