"""On-policy distillation of a vision-language model."""
