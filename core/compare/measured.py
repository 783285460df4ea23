"""The measured and the estimated cost of candidates, as rows with the columns of points.csv.

Rows of several benchmark runs are combined only if they were measured on the same device in the
same precision; of two measurements of the same point the newer one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.benchmark import analytic
from core.benchmark.analytic import Rates, Shapes
from core.compare.candidates import Candidate
from core.study import Benchmark
from core.words import block_ranges

Row = dict[str, Any]
Cell = tuple[int, int, int]
"""batch size, input tokens, output tokens."""


def cell_of(row: Mapping[str, Any]) -> Cell:
    """Return the cell of the grid that a row measured."""
    return int(row["batch_size"]), int(row["input_tokens"]), int(row["output_tokens"])


def setting_of(bench: Benchmark) -> tuple[str, ...]:
    """Return what two runs must share to be drawn in one chart: device, its name, precision."""
    types = sorted({str(v.get("dtype")) for v in bench.summary.get("variants") or []})
    summary = bench.summary
    threads = str(summary.get("threads", "")) if summary.get("device") == "cpu" else ""
    return (str(summary.get("device")), str(summary.get("device_name")), ", ".join(types), threads)


def mixed_settings(runs: Sequence[Benchmark]) -> str:
    """Return a sentence if the runs cannot share a chart, otherwise an empty string."""
    first = runs[0] if runs else None
    for other in runs[1:]:
        if first and setting_of(other) != setting_of(first):
            one, two = (", ".join(filter(None, setting_of(b))) for b in (first, other))
            return (
                f"{first.id} was measured on {one}, {other.id} on {two}: their times are "
                "not comparable. Choose runs on the same device and in the same precision."
            )
    return ""


def rows_of(runs: Iterable[Benchmark]) -> list[Row]:
    """Return the points of benchmark runs; of two of the same candidate and cell the newer one."""
    kept: dict[tuple[str, Cell], Row] = {}
    for bench in sorted(runs, key=lambda b: b.record.started):
        for point in bench.points:
            if point["id"]:
                kept[point["id"], cell_of(point)] = {**point, "run": bench.id}
    return list(kept.values())


def with_speedup(rows: Sequence[Row], dense: str) -> list[Row]:
    """Return the rows with ``speedup``: dense latency over this one at the same point."""
    base = {cell_of(r): r.get("latency_s_mean") for r in rows if r["id"] == dense}
    result = []
    for row in rows:
        over, own = base.get(cell_of(row)), row.get("latency_s_mean")
        result.append({**row, "speedup": over / own if over and own else None})
    return result


def estimate(shapes: Shapes, rates: Rates | None, cell: Cell, dtype: str) -> Row:
    """Return the estimated cost of a model at one cell: always memory, and times with ``rates``."""
    batch, given, made = cell
    memory = analytic.memory_bytes(shapes, batch, given, made, dtype)["total"]
    row: Row = {
        "batch_size": batch,
        "input_tokens": given,
        "output_tokens": made,
        "peak_memory_mib": memory / 2**20,
        "oom": False,
        "estimated": True,
    }
    if rates is None:
        return row
    whole = analytic.latency_s(shapes, rates, batch, given, made)
    first = analytic.first_token_s(shapes, rates, batch, given)
    return row | {
        "latency_s_mean": whole,
        "latency_s_p50": whole,
        "first_token_s": first,
        "per_token_s": (whole - first) / (made - 1) if made > 1 else None,
        "tokens_per_s": batch * made / whole,
    }


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Return the cells of the grid that were measured, in order."""
    return sorted({cell_of(r) for r in rows})


def table(
    found: Sequence[Candidate],
    rows: Sequence[Row],
    cell: Cell | None,
    estimates: Mapping[str, Row] | None = None,
) -> list[Row]:
    """Return one row per candidate at one cell of the grid: the candidate, its quality, its cost.

    ``kind_of_cost`` is measured, estimated (from ``estimates``, by key), out of memory, or unknown.
    """
    at = {r["id"]: r for r in rows if cell is None or cell_of(r) == cell}
    dense = next((c for c in found if c.kind == "dense"), None)
    result = []
    for candidate in found:
        row = at.get(candidate.id)
        guess = (estimates or {}).get(candidate.id)
        cost = row or guess or {}
        source = "measured" if row else "estimated" if guess else "unknown"
        if row and row["oom"]:
            source = "out of memory"
        relative = candidate.ppl / dense.ppl if candidate.ppl and dense and dense.ppl else None
        seconds = {
            f"{name.removesuffix('_s')}_ms": None if cost.get(name) is None else 1000 * cost[name]
            for name in ("first_token_s", "per_token_s")
        }
        result.append(
            {
                "key": candidate.id,
                "label": candidate.label,
                "series": candidate.series,
                "kind": candidate.kind,
                "retrained": candidate.retrained,
                "parent": candidate.parent,
                "dropped": candidate.dropped,
                "cut_in": block_ranges(candidate.cut_in),
                "parameters": candidate.parameters,
                "ratio": candidate.ratio,
                "ppl": candidate.ppl,
                "ppl_over_dense": relative,
                "latency_s": cost.get("latency_s_mean"),
                **seconds,
                "tokens_per_s": cost.get("tokens_per_s"),
                "speedup": cost.get("speedup"),
                "memory_mib": cost.get("peak_memory_mib"),
                "reserved_mib": cost.get("reserved_mib"),
                "process_mib": cost.get("process_mib"),
                "kind_of_cost": source,
                "is_plan": candidate.is_plan,
            }
        )
    return result
