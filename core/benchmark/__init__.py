"""Latency, throughput and memory of checkpoints: the paper's protocol, and an analytic model."""
