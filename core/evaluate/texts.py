"""Perplexity of a checkpoint on texts: measured, or taken from an earlier run with the same key."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data import sources
from core.data.evaluation import evaluation_windows
from core.evaluate import known

if TYPE_CHECKING:
    from core.evaluate.session import Session
    from core.runs.run import Run

PERPLEXITY = ("source", "window", "bos", "tokens", "ppl")
WINDOWS = ("source", "window", "bos", "index", "nll")
"""Columns of windows.csv; ``nll`` is the mean over the window's predictions, in nats."""


@dataclass(frozen=True)
class TextResult:
    """Perplexity of one text by one protocol."""

    source: str
    window: int
    bos: str
    tokens: int
    """Predictions: the first token of every window is given."""
    ppl: float
    windows: int
    content: str
    """What the text is: a hash of the file, or how it was made."""
    key: str
    batch: int | None
    """Windows computed together."""
    seconds: float
    reused_from: str | None = None
    """The earlier run that measured it; None where this one did."""
    nll: tuple[float, ...] = field(default=(), repr=False)
    """Loss of every window; goes to windows.csv."""

    def summary(self) -> dict[str, Any]:
        """Return everything but the windows."""
        return {k: v for k, v in self.__dict__.items() if k != "nll"}


def measure(session: Session, source: str, window: int) -> TextResult:
    """Return the perplexity of ``source`` in windows of ``window`` tokens."""
    from core.evaluate.perplexity import token_stream, window_losses

    began = time.perf_counter()
    bos, progress = session.spec.bos, session.run.progress
    name = Path(source).name
    ids = token_stream(source, session.tokenizer)
    windows = evaluation_windows(ids, window, bos, session.tokenizer.bos_token_id)
    key = session.key(kind="perplexity", bos=bos, windows=known.windows_content(windows))
    common: dict[str, Any] = {
        "source": source, "window": window, "bos": bos, "key": key,
        "content": sources.describe(source)["content"],
    }  # fmt: skip
    earlier = session.known(key, f"Perplexity of {name} in windows of {window}")
    if earlier:
        record, row = earlier
        losses = read_windows(record.path, row["source"], row["window"], row["bos"])
        if len(losses) == row["windows"]:
            same = {k: row[k] for k in ("tokens", "ppl", "windows", "batch", "seconds")}
            origin = row.get("reused_from") or record.id
            return TextResult(**common, **same, reused_from=origin, nll=losses)
    found = window_losses(session.model, windows, progress, name)
    result = TextResult(
        **common,
        tokens=found.tokens,
        ppl=found.ppl,
        windows=len(found.nll),
        batch=found.batch,
        seconds=round(time.perf_counter() - began, 3),
        nll=found.nll,
    )
    progress.log(f"{name}, windows of {window}: perplexity {result.ppl:.4f}.")
    return result


def write(run: Run, results: Sequence[TextResult]) -> None:
    """Write perplexity.csv and windows.csv."""
    run.write_csv(
        "perplexity.csv", PERPLEXITY, [[getattr(r, c) for c in PERPLEXITY] for r in results]
    )
    rows = [
        (r.source, r.window, r.bos, index, nll) for r in results for index, nll in enumerate(r.nll)
    ]
    run.write_csv("windows.csv", WINDOWS, rows)


def read_windows(folder: Path, source: str, window: int, bos: str) -> tuple[float, ...]:
    """Return the losses of a run's windows of one text and protocol; empty where it has none."""
    wanted = (source, str(window), bos)
    try:
        with (folder / "windows.csv").open(encoding="utf-8", newline="") as handle:
            rows = csv.DictReader(handle)
            return tuple(
                float(r["nll"]) for r in rows if (r["source"], r["window"], r["bos"]) == wanted
            )
    except (OSError, KeyError, ValueError):
        return ()
