"""Results of `bench.gpu` so far: one JSON file and one Markdown table, written after every point.

Points cut short, variants that do not fit and points for which no time was left are all listed,
with the reason.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import gpu_compute
from core.benchmark import analytic, protocol
from core.benchmark.protocol import Cell, CellResult
from core.benchmark.results import Accuracy, Point, accuracy
from core.runs import workspace
from core.runs.dtypes import BYTES

MEMORY, TIME = "a smaller batch ran out of memory", "no time was left"


class Report:
    """The results of all variants; every change is on disk before the next point begins."""

    def __init__(self, folder: Path, about: dict[str, Any], shapes: dict[str, analytic.Shapes]):
        """Keep results of the variants ``shapes`` in ``folder``; ``about``: the conditions."""
        self.folder, self.about, self.shapes = folder, about, shapes
        self.results: dict[str, dict[Cell, list[CellResult]]] = {name: {} for name in shapes}
        self.skipped: list[dict[str, Any]] = []
        self.parameters: dict[str, int] = {}
        self.rates: analytic.Rates | None = None
        self.computed: list[tuple[str, dict[str, Any]]] = []
        """Figures of `bench.gpu_compute`, in the order in which they were measured."""
        self.state = "running"
        self._lock = threading.RLock()  # the watchdog writes from its own thread

    def take(self, name: str, result: CellResult) -> None:
        """Add one visit's measurement of a point and save it."""
        with self._lock:
            self.results[name].setdefault(result.cell, []).append(result)
            self.save()

    def compute(self, name: str, figures: dict[str, Any]) -> None:
        """Add a figure of scoring, training or cutting, and save it."""
        with self._lock:
            self.computed.append((name, figures))
            self.save()
        print(f"{name}: {figures}", flush=True)

    def shares(self, name: str, point: Point) -> dict[str, float]:
        """Return the shares of the measured bandwidth and matmul rate that a point reaches.

        A step reads all weights but the embedding, and the cache; each token takes two operations
        for each of these weights.
        """
        if self.rates is None or not point.latency_s_mean:
            return {}
        shape, dtype = self.shapes[name], self.about["dtype"]
        weights = shape.parameters - (0 if shape.tied else shape.parts["embedding"])
        steps = point.output_tokens
        context = point.input_tokens + steps // 2
        read = weights * BYTES[dtype] + analytic.kv_bytes(shape, point.batch_size, context, dtype)
        flops = 2 * weights * point.batch_size * (point.input_tokens + steps)
        return {
            "bandwidth": steps * read / point.latency_s_mean / self.rates.bandwidth_bytes_per_s,
            "matmul": flops / point.latency_s_mean / self.rates.matmul_flops_per_s,
        }

    def skip(self, name: str, visit: int, cell: Cell, why: str) -> None:
        """Record that a point was not measured on a visit, and why."""
        with self._lock:
            self.skipped.append(
                {"variant": name, "visit": visit, "batch_size": cell.batch_size, "why": why}
            )

    def full(self, name: str, cell: Cell) -> bool:
        """Whether this batch or a smaller one ran out of memory."""
        seen = self.results[name].items()
        return any(c.batch_size <= cell.batch_size and any(r.oom for r in rs) for c, rs in seen)

    def expected_s(self, name: str, cell: Cell) -> float | None:
        """Return the expected seconds of a generation; None if nothing comparable was measured.

        This point's earlier visit; otherwise the slowest variant at this point; otherwise this
        variant's largest batch so far, which is faster than any larger one.
        """

        def median(of: str, at: Cell) -> float | None:
            times = [t for r in self.results[of].get(at, []) for t in r.latencies_s]
            return statistics.median(times) if times else None

        own = median(name, cell)
        others = [median(other, cell) for other in self.results]
        smaller = [median(name, at) for at in self.results[name]]
        known = [t for t in others if t is not None] or [t for t in smaller if t is not None]
        return own if own is not None else max(known, default=None)

    def rows(self) -> dict[str, list[Point]]:
        """Return the points of every variant, measured and estimated."""
        return {
            name: [
                protocol.point(name, self.about["input_tokens"], rs, **self._estimate(name, cell))
                for cell, rs in cells.items()
            ]
            for name, cells in self.results.items()
        }

    def _estimate(self, name: str, cell: Cell) -> dict[str, float | None]:
        shape = (cell.batch_size, self.about["input_tokens"], cell.output_tokens)
        memory = analytic.memory_bytes(self.shapes[name], *shape, self.about["dtype"])["total"]
        known = self.rates and analytic.latency_s(self.shapes[name], self.rates, *shape)
        return {"estimated_latency_s": known, "estimated_memory_mib": memory / 2**20}

    def summary(self) -> dict[str, Any]:
        """Return the contents of bench-gpu.json."""
        rows = self.rows()
        points = [p for group in rows.values() for p in group]
        runs = [p.runs for p in points if not p.oom]
        return {
            "state": self.state,
            **self.about,
            "parameters": self.parameters,
            "median_runs": statistics.median(runs) if runs else None,
            "analytic": dataclasses.asdict(accuracy(points)),
            "rates": self.rates and dataclasses.asdict(self.rates),
            "largest_batch_estimated": self._largest(),
            "skipped": self.skipped,
            "computed": dict(self.computed),
            "points": [
                dataclasses.asdict(p) | {"shares": self.shares(name, p)}
                for name, group in rows.items()
                for p in group
            ],
        }

    def _largest(self) -> dict[str, int] | None:
        """Return the largest batch of each variant that should fit this device; none on a CPU."""
        capacity, about = self.about["capacity_mib"], self.about
        if capacity is None:
            return None
        lengths = (about["input_tokens"], about["output_tokens"])
        return {
            name: analytic.largest_batch(shapes, capacity * 2**20, *lengths, about["dtype"])
            for name, shapes in self.shapes.items()
        }

    def save(self) -> None:
        """Write bench-gpu.json and bench-gpu.md, each atomically."""
        with self._lock:
            workspace.write_json(self.folder / "bench-gpu.json", self.summary())
            workspace.write_text(self.folder / "bench-gpu.md", self.text())

    def headlines(self, cells: Sequence[Cell], names: Sequence[str]) -> list[str]:
        """Return a line for each batch: the latency of every variant, and how many times faster."""
        lines = []
        for cell in cells:
            means = {name: self._mean_s(name, cell) for name in self.results}
            base = next(iter(means.values()), None)
            parts = []
            for name in names:
                mean = means.get(name)
                if mean is None:
                    continue
                gain = f", {base / mean:.2f} x" if base and name != next(iter(means)) else ""
                rate = cell.batch_size * cell.output_tokens / mean
                parts.append(f"{name} {mean:.3f} s ({rate:,.0f} tokens/s{gain})")
            if parts:
                lines.append(f"Batch {cell.batch_size}: {'; '.join(parts)}")
        return lines

    def _mean_s(self, name: str, cell: Cell) -> float | None:
        found = self.results[name].get(cell, [])
        times = [t for result in found for t in result.latencies_s]
        return statistics.fmean(times) if times and not any(r.oom for r in found) else None

    def text(self) -> str:
        """Return the Markdown: conditions, table, and what is missing from it."""
        found = self.summary()
        head = (
            f"{found['device_name']}, {found['dtype']}, random weights, {found['input_tokens']} "
            f"tokens in, {found['output_tokens']} out, torch {found['torch']}, transformers "
            f"{found['transformers']}; measured; timed runs per point: median "
            f"{found['median_runs'] or 0:g}. State: {found['state']}.\n\n"
        )
        rows = self.rows()
        errors = accuracy(p for group in rows.values() for p in group)
        cells = sorted({c for found in self.results.values() for c in found}, key=_size)
        first = self.headlines(cells, tuple(self.results))
        head += "".join(f"- {line}\n" for line in first) + "\n" * bool(first)
        if self.computed:
            head += gpu_compute.table(self.computed) + "\n"
        shares = {n: [self.shares(n, p) for p in group] for n, group in rows.items()}
        return (
            head + table(rows, self.parameters, shares) + "\n".join(["", *notes(found, errors), ""])
        )


def _size(cell: Cell) -> tuple[int, int]:
    return cell.batch_size, cell.output_tokens


def notes(found: dict[str, Any], off: Accuracy) -> list[str]:
    """Return lines on what was not measured, and on how far the estimates are ``off``."""
    lines = []
    for why in (MEMORY, TIME):
        skipped = [s for s in found["skipped"] if s["why"] == why]
        if skipped:
            named = (f"{s['variant']} batch {s['batch_size']}" for s in skipped)
            lines.append(f"Not measured, because {why}: {', '.join(dict.fromkeys(named))}.")
    for what, errors in (("latency", off.latency), ("memory", off.memory)):
        if errors.points:
            lines.append(
                f"Error of the analytic model of {what}: median {errors.median_error_pct:.0f} "
                f"%, worst {errors.worst_error_pct:.0f} %, over {errors.points} "
                f"points{' (rough)' if errors.rough else ''}."
            )
    if found["largest_batch_estimated"]:
        named = (f"{name} {batch:,}" for name, batch in found["largest_batch_estimated"].items())
        lines.append(f"Largest batch that should fit (estimated): {', '.join(named)}.")
    return lines


def table(
    rows: dict[str, list[Point]],
    parameters: dict[str, int],
    shares: dict[str, list[dict[str, float]]],
) -> str:
    """Return the Markdown table: each point with its speed-up over dense at the same batch."""
    dense = {
        (p.batch_size, p.output_tokens): p.latency_s_mean for p in next(iter(rows.values()), [])
    }
    lines = [
        "| variant | parameters | batch | latency s | std | first token s | tokens/s "
        "| speed-up | of bandwidth | of matmul | peak MiB | GPU % | runs |",
        "| --- | " + " | ".join(["---:"] * 12) + " |",
    ]
    for name, points in rows.items():
        for p, share in zip(points, shares[name], strict=True):
            size = parameters.get(name)
            start = f"| {name} | {'-' if size is None else f'{size:,}'} | {p.batch_size} |"
            if p.oom:
                lines.append(start + " out of memory | | | | | | | | | |")
                continue
            base = dense.get((p.batch_size, p.output_tokens))
            gain = f"{base / p.latency_s_mean:.2f} x" if base and p.latency_s_mean else "-"
            busy = "-" if p.utilisation_pct is None else f"{p.utilisation_pct:.0f}"
            spread = p.latency_s_std
            of = [f"{share[k]:.0%}" if k in share else "-" for k in ("bandwidth", "matmul")]
            lines.append(
                f"{start} {p.latency_s_mean:.3f} | "
                f"{'-' if spread is None else f'{spread:.3f}'} | {p.first_token_s:.4f} | "
                f"{p.tokens_per_s:.0f} | {gain} | {' | '.join(of)} | {p.peak_memory_mib:.0f} | "
                f"{busy} | "
                f"{p.runs} |"
            )
    return "\n".join(lines) + "\n"
