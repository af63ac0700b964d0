"""Benchmarks against other trainers and other ways: `python -m tests.benchmarks SUITE`."""
