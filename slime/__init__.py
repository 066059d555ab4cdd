"""On-policy distillation for vision-language models. The tree is the pipeline: start reading at `slime/train.py`."""
