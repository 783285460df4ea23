"""Checkpoints on disk and on the Hub, read without loading a model."""
