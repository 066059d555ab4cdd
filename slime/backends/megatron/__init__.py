"""The Megatron backend: Qwen3 and Qwen3-VL on megatron-core, under every parallelism, on GPUs and on a CPU.

Heavy modules are imported below this package alone: `megatron` has no other door.
"""
