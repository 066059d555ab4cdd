"""The FSDP2 backend: Hugging Face models, `fully_shard`, NCCL or gloo, any number of ranks."""
