"""Training backends behind one protocol (`base.py`)."""
