"""The run as processes: who gets which GPUs (pure), and the Ray actors.

This file imports nothing, Ray least of all: the launcher and the unit tests read the placement without it.
"""
