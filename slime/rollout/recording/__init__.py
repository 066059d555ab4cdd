"""Rollouts as files: one parquet a rollout, with all that training needs of it and readable by any tool.

`places.py` says where they lie, `head.py` who wrote one, `columns.py` what a row is (`arrays.py` its lists of
numbers), `file.py` writes and reads. Nothing here asks a server. This file imports nothing: the driver reads
heads without torch.
"""
