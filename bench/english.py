"""Whether the bundled text ranks blocks as web text does.

    python -m bench.english [CHECKPOINT] [--reference FILE] [--also SOURCE ...] [--out FOLDER]

Every block of a model is left out (PPL criterion) on rows of ``english``, of a reference text (C4)
and of other texts. The loss of every row is kept, so rankings of many sets of rows follow from one
pass: the rows of each text are divided into disjoint groups, and every group of the reference is
compared with every other one, and with every group of the other text. The text is good enough if
its ranking agrees with the reference's as well as two groups of the reference agree with each
other. Writes docs/results/english.md; losses are kept in the folder --out, so that an interrupted
run continues.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.importance.agreement import spearman

ROOT = Path(__file__).parents[1]
MODEL = Path.home() / ".cache/depthcut-real/smollm2-135m"
C4 = ROOT / "../shared/real/text/c4_300.jsonl"
ROWS, LENGTH, SEED = (224, 128), 128, 1234
"""Rows of the reference, and of each other text: almost all that are long enough."""
BATCH = 16
"""Rows scored between two saves."""
SIZES = (10, 16, 32)
FIRST = 6
"""Blocks removed first whose overlap is reported: 20 % of 30."""

Losses = list[list[float]]
"""[branch][row]; branch 0 is the dense model, branch b + 1 is without block b."""
Ranked = list[list[float]]
"""[group][block]: the mean loss without each block."""


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


@dataclass(frozen=True)
class Agreement:
    """How well rankings from two texts agree: one value for every pair of groups of rows."""

    spearman: tuple[float, ...]
    kendall: tuple[float, ...]
    overlap: tuple[int, ...]
    """Blocks that are among the first `FIRST` of both rankings."""

    @staticmethod
    def of(first: Ranked, second: Ranked | None = None) -> Agreement:
        """Compare every group of ``first`` with every one of ``second``; default: in ``first``."""
        pairs = (
            itertools.combinations(first, 2) if second is None else itertools.product(first, second)
        )
        found = [(spearman(a, b), kendall(a, b), len(_least(a) & _least(b))) for a, b in pairs]
        return Agreement(*zip(*found, strict=True)) if found else Agreement((), (), ())


def groups(found: Losses, size: int) -> Ranked:
    """Return every block's mean loss in each of the disjoint groups of ``size`` rows."""
    rows = list(range(len(found[0])))
    random.Random(SEED).shuffle(rows)
    starts = range(0, len(rows) - size + 1, size)
    return [scores(found, rows[start : start + size]) for start in starts]


def _least(values: Sequence[float]) -> set[int]:
    return set(sorted(range(len(values)), key=values.__getitem__)[:FIRST])


def table(reference: Losses, others: dict[str, Losses]) -> list[str]:
    """Return the table as Markdown lines, and what follows from it."""
    lines = [
        "| rows | rankings compared | pairs | Spearman: mean | range | Kendall: mean | range "
        f"| same of the first {FIRST} blocks |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    verdicts = []
    for size in SIZES:
        c4 = groups(reference, size)
        among = Agreement.of(c4)
        shown = {"C4 with C4": among}
        for name, other in others.items():
            own = groups(other, size)
            shown[f"{name} with C4"] = across = Agreement.of(c4, own)
            shown[f"{name} with {name}"] = itself = Agreement.of(own)
            if among.spearman and across.spearman:
                verdicts += ["", verdict(size, name, among, across, itself)]
        lines += [_row(size, name, found) for name, found in shown.items() if found.spearman]
    return [*lines, *verdicts]


def _row(size: int, name: str, found: Agreement) -> str:
    cells = [f"{size} x {LENGTH}", name, str(len(found.spearman))]
    for values in (found.spearman, found.kendall):
        cells += [f"{statistics.fmean(values):.3f}", f"{min(values):.3f} to {max(values):.3f}"]
    return "| " + " | ".join([*cells, f"{statistics.fmean(found.overlap):.2f}"]) + " |"


def verdict(size: int, name: str, among: Agreement, across: Agreement, itself: Agreement) -> str:
    """Return one sentence on whether the aim is met, with the share that is the texts' difference.

    What two samples of one text agree to is how reliable a ranking by these rows is. The agreement
    across texts divided by the geometric mean of both reliabilities is what the rankings would
    agree to without that noise (Spearman's correction for attenuation).
    """
    inside, between = statistics.fmean(among.spearman), statistics.fmean(across.spearman)
    met = "met" if between >= inside else "missed"
    text = (
        f"{size} x {LENGTH}: {name} agrees with C4 to {between:.4f} on average, two disjoint "
        f"samples of C4 to {inside:.4f}: the aim is **{met}**, by {abs(between - inside):.4f}."
    )
    if not itself.spearman:
        return text
    own = statistics.fmean(itself.spearman)
    return (
        f"{text} Without the noise of small samples (Spearman's correction for attenuation: "
        f"divided by the geometric mean of {inside:.4f} and {own:.4f}, to which samples of "
        f"one text agree) it would be {between / math.sqrt(inside * own):.4f}."
    )


def main() -> int:
    """Compute, compare and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default=str(MODEL))
    parser.add_argument("--reference", default=str(C4))
    parser.add_argument("--also", nargs="*", default=[], help="Other SOURCEs to compare.")
    parser.add_argument("--rows", type=int, nargs=2, default=ROWS, help="Of C4, of the others.")
    parser.add_argument("--out", default="/tmp/depthcut-english")
    parser.add_argument("--batches", type=int, help="Stop after this many batches of rows.")
    asked = parser.parse_args()
    folder = Path(asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        source: losses(asked.checkpoint, source, rows, folder, asked.batches)
        for source, rows in (
            (asked.reference, asked.rows[0]),
            *((source, asked.rows[1]) for source in ("english", *asked.also)),
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
            f"each block), rows of {LENGTH} tokens: of C4 each from a document of its own. The "
            f"rows of a text are divided at random into disjoint groups of "
            f"{', '.join(map(str, SIZES))} rows; each group ranks the blocks, and all pairs of "
            "groups are compared. Measured on a CPU, weights in bfloat16, computed in float32.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
