"""Measurements of the project's parts, each a command of its own."""
