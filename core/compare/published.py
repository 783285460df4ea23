"""Figures that others published, to be shown beside measured ones; published.csv has the sources.

Rows of different sources are never put together: the same dense model has other averages in other
tables. A row compares with the dense row of its own source and model only.
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
    """Return the sources that have ``measure`` of a pruned model; all of them without one."""
    rows = [r for r in figures() if r["method"] != "dense" and (not measure or r[measure])]
    return list(dict.fromkeys(r["source"] for r in rows))


def over_dense(source: str, measure: str = "wikitext2_ppl") -> list[dict[str, Any]]:
    """Return a source's pruned rows with ``over_dense``: the measure over its own dense row's.

    Rows without a ratio, or of a model whose dense row the source does not give, are left out.
    """
    rows = [r for r in figures() if r["source"] == source and r[measure]]
    dense = {r["model"]: r[measure] for r in rows if r["method"] == "dense"}
    return [
        {**r, "label": f"{r['model']} {r['label']}", "over_dense": r[measure] / dense[r["model"]]}
        for r in rows
        if r["method"] != "dense" and r["model"] in dense and r["ratio"]
    ]
