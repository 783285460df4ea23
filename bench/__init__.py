"""Benchmarks against the naive way, run by hand: ``python -m bench.NAME``."""
