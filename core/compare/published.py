"""Published figures to show beside measured ones; published.csv names the sources.

Rows of different sources are never mixed: the same dense model has different averages in different
tables. A row is comparable only with the dense row of its own source and model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.study import read_rows

FILE = Path(__file__).with_name("published.csv")


def figures() -> list[dict[str, Any]]:
    """Return all rows; unknown values are None."""
    return read_rows(FILE)


def sources(measure: str = "") -> list[str]:
    """Return the sources that give ``measure`` for a pruned model; by default all sources."""
    rows = [r for r in figures() if r["method"] != "dense" and (not measure or r[measure])]
    return list(dict.fromkeys(r["source"] for r in rows))


def over_dense(source: str, measure: str = "wikitext2_ppl") -> list[dict[str, Any]]:
    """Return a source's pruned rows with ``over_dense``: the measure over its own dense row's.

    Rows without a ratio are left out, and those of a model without a dense row in the source.
    """
    rows = [r for r in figures() if r["source"] == source and r[measure]]
    dense = {r["model"]: r[measure] for r in rows if r["method"] == "dense"}
    return [
        {**r, "label": f"{r['model']} {r['label']}", "over_dense": r[measure] / dense[r["model"]]}
        for r in rows
        if r["method"] != "dense" and r["model"] in dense and r["ratio"]
    ]
