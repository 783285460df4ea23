"""Whether the bundled text ranks blocks as web text does.

    python -m bench.english [CHECKPOINT] [--reference FILE] [--also SOURCE ...] [--out FOLDER]

Every block of a model is left out (PPL criterion) on rows of ``english``, of a reference text (C4)
and of other texts. The loss of every row is kept, so rankings of many sets of rows follow from one
pass: for each of `SEEDS` seeds, two disjoint sets of reference rows and one set of rows of each
other text. The text is good enough if its ranking agrees with the reference's as well as two sets
of the reference agree with each other. Writes docs/results/english.md; losses are kept in the
folder --out, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from core.importance.agreement import spearman

ROOT = Path(__file__).parents[1]
MODEL = Path.home() / ".cache/depthcut-real/smollm2-135m"
C4 = ROOT / "../shared/real/text/c4_300.jsonl"
ROWS, LENGTH, SEED = 64, 128, 1234
"""Rows of the reference; half as many of each other text."""
BATCH = 16
"""Rows scored between two saves."""
SEEDS = 200
SIZES = (10, 16, 32)
FIRST = 6
"""Blocks removed first whose overlap is reported: 20 % of 30."""

Losses = list[list[float]]
"""[branch][row]; branch 0 is the dense model, branch b + 1 is without block b."""


def losses(model: str, source: str, rows: int, folder: Path, batches: int | None = None) -> Losses:
    """Return the loss of every row without each block; computes what the folder lacks."""
    path = folder / f"{Path(source).stem}.json"
    found: Losses = json.loads(path.read_text()) if path.is_file() else []
    done = len(found[0]) if found else 0
    if done >= rows or batches == 0:
        return found
    from core.checkpoint import locate
    from core.data.calibration import sample
    from core.importance.branches import make_batch
    from core.importance.sweep import sweep
    from core.model import loading
    from core.model.blocks import BlockView
    from core.runs.spec import DeviceOptions

    checkpoint = locate.open(model)
    tokenizer = loading.load_tokenizer(checkpoint.folder)
    drawn = sample(source, tokenizer, rows, LENGTH, SEED).rows
    view = BlockView(loading.prepare(DeviceOptions(), checkpoint, "blocks").load(print))
    while done < rows and batches != 0:
        part = drawn[done : done + BATCH]
        result = sweep(view, make_batch(part, view), perplexity=True)
        new = [list(row) for row in result.sample_nll]
        found = [a + b for a, b in zip(found, new, strict=True)] if found else new
        done = len(found[0])
        path.write_text(json.dumps(found))
        batches = None if batches is None else batches - 1
        print(f"{source}: {done} of {rows} rows", flush=True)
    return found


def scores(found: Losses, rows: Sequence[int]) -> list[float]:
    """Return every block's mean loss over some rows."""
    return [statistics.fmean(branch[row] for row in rows) for branch in found[1:]]


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's rank correlation of two lists without ties."""
    pairs = [(i, j) for j in range(len(first)) for i in range(j)]
    same = sum((first[i] < first[j]) == (second[i] < second[j]) for i, j in pairs)
    return 2 * same / len(pairs) - 1


def agreements(reference: Losses, other: Losses | None, size: int) -> dict[str, list[float]]:
    """Return the agreement over seeds: of two sets of the reference, or of one with ``other``."""
    found: dict[str, list[float]] = {"spearman": [], "kendall": [], "overlap": []}
    for seed in range(SEEDS):
        draw = random.Random(seed)
        order = draw.sample(range(len(reference[0])), 2 * size)
        first = scores(reference, order[:size])
        if other is None:
            second = scores(reference, order[size:])
        else:
            second = scores(other, draw.sample(range(len(other[0])), size))
        found["spearman"].append(spearman(first, second))
        found["kendall"].append(kendall(first, second))
        least = [set(sorted(range(len(s)), key=s.__getitem__)[:FIRST]) for s in (first, second)]
        found["overlap"].append(len(least[0] & least[1]))
    return found


def table(reference: Losses, others: dict[str, Losses]) -> list[str]:
    """Return the table as Markdown lines."""
    lines = [
        "| rows | compared with C4 | Spearman: mean | 5 % to 95 % | Kendall: mean | 5 % to 95 % "
        f"| same of the first {FIRST} blocks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        for name, other in {"C4, other documents": None, **others}.items():
            if len(reference[0]) < 2 * size or (other and len(other[0]) < size):
                continue
            found = agreements(reference, other, size)
            cells = [f"{size} x {LENGTH}", name]
            for key in ("spearman", "kendall"):
                cuts = statistics.quantiles(found[key], n=20)
                cells += [f"{statistics.fmean(found[key]):.3f}", f"{cuts[0]:.3f} to {cuts[-1]:.3f}"]
            lines.append(
                "| " + " | ".join([*cells, f"{statistics.fmean(found['overlap']):.2f}"]) + " |"
            )
    return lines


def main() -> int:
    """Compute, compare and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default=str(MODEL))
    parser.add_argument("--reference", default=str(C4))
    parser.add_argument("--also", nargs="*", default=[], help="Other SOURCEs to compare.")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", default="/tmp/depthcut-english")
    parser.add_argument("--batches", type=int, help="Stop after this many batches of rows.")
    asked = parser.parse_args()
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        source: losses(asked.checkpoint, source, rows, folder, asked.batches)
        for source, rows in (
            (asked.reference, asked.rows),
            *((source, asked.rows // 2) for source in ("english", *asked.also)),
        )
    }
    rows = ", ".join(f"{len(one[0])} rows of {Path(name).stem}" for name, one in found.items())
    lines = table(found.pop(asked.reference), {Path(name).stem: one for name, one in found.items()})
    lines += ["", f"Scored: {rows}."]
    print("\n".join(lines))
    (ROOT / "docs/results/english.md").write_text(page(asked.checkpoint, lines), encoding="utf-8")
    return 0


def page(model: str, lines: list[str]) -> str:
    """Return docs/results/english.md."""
    return "\n".join(
        [
            "# Does the bundled text rank blocks as web text does?",
            "",
            f"`python -m bench.english`: {Path(model).name}, PPL criterion (perplexity without "
            f"each block), rows of {LENGTH} tokens, {SEEDS} seeds. For every seed two disjoint "
            "sets of C4 documents are drawn, and one set of rows of each other text; the first "
            "set of C4 is compared with each. Measured on a CPU, weights in bfloat16, computed in "
            "float32.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
