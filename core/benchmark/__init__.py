"""Latency, throughput and memory of checkpoints, by the paper's protocol, and an analytic model."""
