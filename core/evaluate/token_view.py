"""One text token by token: each token's loss and a model's likeliest tokens; as HTML. No torch.

Two models with the same tokenizer stand side by side; each token is coloured by its loss, or by how
much more the second model loses. Hovering shows what both would have written there.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from core.data import files
from core.errors import DataError
from core.outside import Malformed, loads
from core.runs.results import from_dict

if TYPE_CHECKING:
    from core.runs.run import Run

FILE = "token_losses.jsonl"
LIKELIEST = 5
"""Tokens kept for every place, the likeliest first."""
HIGH = 6.0
"""Loss in nats from which a token has the full colour."""
APART = 2.0
"""Difference in nats from which a token has the full colour."""
NOTED = 0.5
"""Difference in nats from which a token is underlined, so that colour is not needed."""
BLUE, ORANGE = "0,114,178", "213,94,0"


LEGEND = (
    f"Losses in nats: the darker, the less expected, up to {HIGH:g}. Difference: orange and "
    "underlined if the second model loses more, blue and dotted if it loses less. Hovering over a "
    "token shows both losses and the five tokens that each model finds likeliest there."
)
"""What colours and hovering mean."""


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """A text as one model reads it."""

    source: str = ""
    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    """The text of each token; together they are the text."""
    nll: tuple[float | None, ...] = ()
    """Loss of each token in nats, given all before it; None for the first."""
    top: tuple[tuple[tuple[str, float], ...], ...] = ()
    """For each token the likeliest ones in its place, with their probabilities."""

    @property
    def mean(self) -> float:
        """Mean loss in nats."""
        known = [loss for loss in self.nll if loss is not None]
        return math.fsum(known) / len(known) if known else math.nan


def write(run: Run, views: Iterable[TokenView]) -> None:
    """Write a run's views, one a line; no file without any."""
    lines = [json.dumps(asdict(view), ensure_ascii=False) for view in views]
    if lines:
        run.write_text(FILE, "\n".join(lines) + "\n")


def read(folder: Path) -> tuple[TokenView, ...]:
    """Return a run's views; empty if it kept none, or they cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return ()
    try:
        found = [from_dict(TokenView, loads(line)) for line in files.lines(path) if line.strip()]
    except (DataError, Malformed, AttributeError):
        return ()
    return tuple(view for view in found if view is not None and _is_whole(view))


def _is_whole(view: TokenView) -> bool:
    return len(view.ids) == len(view.pieces) == len(view.nll) == len(view.top) > 0


def comparable(first: TokenView, second: TokenView) -> bool:
    """Whether two views are of the same tokens."""
    return first.ids == second.ids


def by_loss(
    view: TokenView, other: TokenView | None = None, label: str = "", beside: str = ""
) -> str:
    """Return a text as HTML, each token coloured by its loss; hovering also shows ``other``."""
    return _box(
        _token(piece, _share(loss, HIGH), BLUE, _hover(view, other, at, label, beside), "")
        for at, (piece, loss) in enumerate(zip(view.pieces, view.nll, strict=True))
    )


def by_difference(dense: TokenView, view: TokenView, label: str = "", beside: str = "") -> str:
    """Return a text as HTML, coloured by how much more ``view`` loses than ``dense``.

    Orange and underlined is worse, blue and dotted better.
    """

    def token(at: int) -> str:
        more = difference(dense, view, at)
        colour = ORANGE if more > 0 else BLUE
        line = ""
        if abs(more) >= NOTED:
            line = f"border-bottom:2px {'solid' if more > 0 else 'dotted'} rgb({colour})"
        about = _hover(view, dense, at, label, beside)
        return _token(view.pieces[at], _share(abs(more), APART), colour, about, line)

    return _box(map(token, range(len(view.pieces))))


def difference(dense: TokenView, view: TokenView, at: int) -> float:
    """Return how much more ``view`` loses at a token, in nats; 0 for the first."""
    one, other = dense.nll[at], view.nll[at]
    return 0.0 if one is None or other is None else other - one


def summary(dense: TokenView, view: TokenView, label: str) -> str:
    """Return in a sentence where a variant loses more than the dense model."""
    apart = [difference(dense, view, at) for at in range(1, len(view.ids))]
    worse = sorted((more for more in apart if more > 0), reverse=True)
    total = math.fsum(worse)
    said = (
        f"{len(view.ids):,} tokens: the dense model loses {dense.mean:.3f} nats per token, {label} "
        f"{view.mean:.3f}"
    )
    if total <= 0:
        return said + "."
    tenth = max(1, len(apart) // 10)
    share = math.fsum(worse[:tenth]) / total
    return f"{said}; the worst tenth of the tokens has {share:.0%} of what it loses more."


def _share(value: float | None, most: float) -> float:
    return 0.0 if value is None else max(0.0, min(1.0, value / most))


def _token(piece: str, share: float, colour: str, about: str, line: str) -> str:
    style = f"background:rgba({colour},{0.65 * share:.2f})" if share > 0.01 else ""
    style = ";".join(filter(None, (style, line)))
    shown = html.escape(piece)
    if not piece.strip(" "):
        shown = shown or "·"
    return f'<span title="{html.escape(about, quote=True)}" style="{style}">{shown}</span>'


def _hover(view: TokenView, other: TokenView | None, at: int, label: str, beside: str) -> str:
    parts = [_guesses(view, at, label)]
    if other is not None and comparable(view, other):
        parts.append(_guesses(other, at, beside))
        if view.nll[at] is not None:
            parts.append(f"difference {abs(difference(other, view, at)):.2f} nats")
    return f"{_quoted(view.pieces[at])}\n\n" + "\n\n".join(parts)


def _guesses(view: TokenView, at: int, label: str) -> str:
    loss = view.nll[at]
    head = "the first token has no loss" if loss is None else f"loss {loss:.2f} nats"
    lines = [f"{share:.1%}  {_quoted(piece)}" for piece, share in view.top[at]]
    return "\n".join([f"{label or 'model'}: {head}", *lines])


def _quoted(piece: str) -> str:
    return json.dumps(piece, ensure_ascii=False)


def _box(tokens: Iterable[str]) -> str:
    style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.75;font-size:.95rem"
    return f'<div style="{style}">{"".join(tokens)}</div>'


def pairs(
    dense: Sequence[TokenView], others: Sequence[TokenView]
) -> list[tuple[TokenView, TokenView]]:
    """Return the views of the same text, the dense model's first."""
    return [
        (one, found)
        for one in dense
        if (found := next((view for view in others if comparable(one, view)), None))
    ]
