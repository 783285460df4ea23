"""Perplexity of a checkpoint on texts: measured, or reused from an earlier run with its key."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data import sources
from core.data.evaluation import evaluation_tokens, windows_of
from core.evaluate import known
from core.evaluate import token_view as views
from core.evaluate.results import Text, TextRow, WindowRow, read_windows
from core.evaluate.token_view import TokenView

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
    view: TokenView | None = field(default=None, repr=False)
    """Its beginning token by token; None if it was not kept."""


def error_of(ppl: float, nll: Sequence[float]) -> float | None:
    """Return the standard error of a perplexity from its windows' mean losses (delta method)."""
    if len(nll) < 2:
        return None
    return ppl * statistics.stdev(nll) / len(nll) ** 0.5


def measure(session: Session, source: str, window: int) -> TextResult:
    """Return the perplexity of ``source`` in windows of ``window`` tokens."""
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
            return TextResult(text, same.ppl, losses, _kept(session, record.path, windows))
    found = session.losses(windows, name)
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
    return TextResult(text, found.ppl, found.nll, _viewed(session, source, windows))


def _beginning(session: Session, windows: Sequence[Sequence[int]]) -> list[int]:
    """Return the first tokens of a text; of windows that each have a BOS only the first."""
    joined = windows if session.spec.bos == "once" and session.spec.join != "off" else windows[:1]
    some = session.spec.token_view
    found = itertools.islice(itertools.chain.from_iterable(joined), min(some, _longest(session)))
    return list(found)


def _longest(session: Session) -> int:
    return session.info.context or 1 << 30


def _viewed(session: Session, source: str, windows: Sequence[Sequence[int]]) -> TokenView | None:
    """Return the beginning of a text token by token, if it is asked for.

    None if the model was read block by block, since it takes a pass of the whole model.
    """
    from core.evaluate.token_losses import token_view

    if not session.is_loaded or not session.run.ranks.is_first:
        return None
    ids = _beginning(session, windows)
    return token_view(session.model, session.tokenizer, ids, source) if len(ids) > 1 else None


def _kept(session: Session, folder: Path, windows: Sequence[Sequence[int]]) -> TokenView | None:
    """Return what an earlier run kept of the same tokens."""
    ids = tuple(_beginning(session, windows))
    return next((view for view in views.read(folder) if view.ids == ids), None)


def write(run: Run, results: Sequence[TextResult]) -> None:
    """Write perplexity.csv, windows.csv, and the texts' beginnings token by token."""
    views.write(run, {r.view.ids: r.view for r in results if r.view}.values())
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
