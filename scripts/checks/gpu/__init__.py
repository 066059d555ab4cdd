"""What a GPU must agree on with the CPU, and what a training step costs there: `bash scripts/check_gpu.sh`.

One module a check: its `run(setting)` yields the rows of the table. Each runs in a process of its own, so
that a crash or a full memory is one check's alone.
"""
