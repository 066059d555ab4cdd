"""A reward plugin as users of upstream slime write theirs: its own HTTP call, whole-prompt scores, tail
slicing.

It knows nothing of this project but the two import paths that upstream has too. It must run here unchanged.
"""

from __future__ import annotations

import aiohttp
import torch

from slime.utils.processing_utils import encode_image_for_rollout_engine


async def reward_func(args, sample, **kwargs):
    """Ask the teacher for the log-probs of the whole sequence."""
    request = {
        "input_ids": sample.tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    if sample.multimodal_inputs and sample.multimodal_inputs.get("images"):
        pictures = sample.multimodal_inputs["images"]
        request["image_data"] = [encode_image_for_rollout_engine(picture) for picture in pictures]
    async with aiohttp.ClientSession() as session, session.post(args.rm_url, json=request) as answer:
        answer.raise_for_status()
        return await answer.json()


def post_process_rewards(args, samples, **kwargs):
    """Keep the response's part of the scores."""
    for sample in samples:
        scored = sample.reward["meta_info"]["input_token_logprobs"]
        values = torch.tensor([entry[0] for entry in scored[1:]], dtype=torch.float32)
        sample.teacher_log_probs = values[-sample.response_length :]
    nothing = [0.0] * len(samples)
    return nothing, nothing
