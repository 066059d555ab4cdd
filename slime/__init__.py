"""On-policy distillation for vision-language models; start reading at `slime/train.py`."""
