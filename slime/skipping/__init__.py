"""Optimizer steps that are not taken: when, on whose account, and when a run of them ends the training.

The trainer asks `refusal` on every rank, with numbers that all ranks share, so they all skip or none does.
The driver keeps the account and ends the run.
"""
