"""Benchmarks against naive implementations, run by hand: ``python -m bench.NAME``."""

from __future__ import annotations

from pathlib import Path


def report(text: str, save: Path | None) -> None:
    """Print a result, and write it to ``save`` if given."""
    print(text)
    if save:
        save.write_text(text)
