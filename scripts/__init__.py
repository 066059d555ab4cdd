"""Set-up, tests and benchmarks. A package only so that `python -m scripts.benchmarks...` finds them."""
