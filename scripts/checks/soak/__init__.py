"""A long run under random faults: does it lose, leak or leave anything? `python -m scripts.checks.soak`."""
