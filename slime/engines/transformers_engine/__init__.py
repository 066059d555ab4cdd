"""SGLang's HTTP API on transformers, for a CPU or one GPU: `python -m slime.engines.transformers_engine`.

It stands where an SGLang server would, for the student and for the teacher, and answers alike, strictness
included. Concurrent requests share forwards (a step-wise batcher with a KV cache); there is no prefix cache
and no paging.

A trainer changes the weights by all of SGLang's ways: a checkpoint folder, its own memory on this machine
(`/update_weights_from_tensor`), a process group (`/update_weights_from_distributed`). A mixture of experts
takes them by folder alone. `/release_memory_occupation` gives the memory back; until it is resumed, and the
weights are sent anew, requests are answered 503. What kills the real server (a wrong shape, a wrong order of
the memory verbs) is refused with a 400 here.

`--deterministic` makes answers repeat bit for bit on one machine and thread count. A generating request then
says in `sampling_params.custom_params` where it belongs: `{"wave": str, "wave_size": int, "order": int}`. The
engine waits for all `wave_size` requests of a wave, runs waves one at a time, and admits a wave's requests by
`order`; so a client must keep at least `wave_size` requests in flight. Requests without a wave, and scoring
requests, run alone.
"""
