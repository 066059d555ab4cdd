"""The parts of `scripts.benchmarks.learning`."""
