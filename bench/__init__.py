"""Benchmarks against the naive way, run by hand: ``python -m bench.NAME``."""

from __future__ import annotations

from pathlib import Path


def tell(text: str, save: Path | None) -> None:
    """Print a result, and write it to ``save`` where that is given."""
    print(text)
    if save:
        save.write_text(text)
