"""Perplexity of a checkpoint on texts: measured, or reused from an earlier run with its key."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data import sources
from core.data.evaluation import evaluation_tokens, windows_of
from core.evaluate import known
from core.evaluate.results import Text, TextRow, WindowRow, read_windows

if TYPE_CHECKING:
    from core.evaluate.session import Session
    from core.runs.run import Run


@dataclass(frozen=True)
class TextResult:
    """Perplexity of one text under one protocol, with the loss of every window."""

    text: Text
    ppl: float
    nll: tuple[float, ...] = field(repr=False)
    """Mean loss of every window's predictions, in nats."""


def error_of(ppl: float, nll: Sequence[float]) -> float | None:
    """Return the standard error of a perplexity from its windows' mean losses (delta method)."""
    if len(nll) < 2:
        return None
    return ppl * statistics.stdev(nll) / len(nll) ** 0.5


def measure(session: Session, source: str, window: int) -> TextResult:
    """Return the perplexity of ``source`` in windows of ``window`` tokens."""
    from core.evaluate.perplexity import window_losses

    began = time.perf_counter()
    bos, progress = session.spec.bos, session.run.progress
    name = Path(source).name
    streams, facts = evaluation_tokens(source, session.tokenizer, session.spec.join)
    windows = windows_of(streams, window, bos, session.tokenizer.bos_token_id)
    most = session.spec.max_tokens
    if most is not None:
        windows = windows[: max(1, most // window)]
    for note in facts.notes:
        progress.log(f"{name}: {note}")
    key = session.key(kind="perplexity", bos=bos, windows=known.windows_content(windows))
    common: dict[str, Any] = {
        "source": source, "window": window, "bos": bos, "key": key,
        "content": sources.describe(source)["content"], "text": facts,
        "max_tokens": most,
    }  # fmt: skip
    earlier = session.known(key, Text, f"Perplexity of {name} in windows of {window}")
    if earlier:
        record, same = earlier
        losses = read_windows(record.path, same.source, same.window, same.bos)
        if same.ppl is not None and len(losses) == same.windows:
            origin = same.reused_from or record.id
            error = error_of(same.ppl, losses)
            text = replace(same, **common, stderr=error, reused_from=origin)
            return TextResult(text, same.ppl, losses)
    found = window_losses(session.model, windows, progress, name)
    text = Text(
        **common,
        tokens=found.tokens,
        ppl=found.ppl,
        stderr=error_of(found.ppl, found.nll),
        windows=len(found.nll),
        batch=found.batch,
        seconds=round(time.perf_counter() - began, 3),
    )
    progress.log(f"{name}, windows of {window}: perplexity {found.ppl:.4f}.")
    return TextResult(text, found.ppl, found.nll)


def write(run: Run, results: Sequence[TextResult]) -> None:
    """Write perplexity.csv and windows.csv."""
    TextRow.write(
        run,
        (
            TextRow(
                source=r.text.source,
                window=r.text.window,
                bos=r.text.bos,
                tokens=r.text.tokens,
                ppl=r.ppl,
            )
            for r in results
        ),
    )
    WindowRow.write(
        run,
        (
            WindowRow(r.text.source, r.text.window, r.text.bos, index, nll)
            for r in results
            for index, nll in enumerate(r.nll)
        ),
    )
