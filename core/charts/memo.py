"""Figures that were drawn before: many sessions look at the same runs, and plotly is slow."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec

import plotly.graph_objects as go

KEPT = 16
"""Figures kept of each kind: some sessions' settings, times the panels of a page."""

P = ParamSpec("P")


def drawn_once(draw: Callable[P, go.Figure]) -> Callable[P, go.Figure]:
    """Keep the figures that ``draw`` made last, by the values of its arguments.

    Nobody may change such a figure; a copy is made by ``go.Figure(figure)``. Arguments are compared
    rather than hashed: those of the same scene are the same objects, which takes no time.
    """
    kept: deque[tuple[tuple[Any, ...], dict[str, Any], go.Figure]] = deque(maxlen=KEPT)

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> go.Figure:
        mine = tuple(map(_own, args)), {name: _own(value) for name, value in kwargs.items()}
        for positional, named, figure in tuple(kept):  # another session may add one meanwhile
            if (positional, named) == mine:
                return figure
        figure = draw(*args, **kwargs)
        kept.append((*mine, figure))
        return figure

    return drawn


def _own(value: Any) -> Any:
    """Return a value that does not change if the caller adds to a list later."""
    return value.copy() if isinstance(value, list | dict | set) else value
