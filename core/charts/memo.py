"""Figures that were drawn before: many sessions look at the same runs, and plotly is slow."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec

import pandas as pd
import plotly.graph_objects as go

KEPT = 16
"""Figures kept of each kind: some sessions' settings, times the panels of a page."""

P = ParamSpec("P")


def drawn_once(draw: Callable[P, go.Figure]) -> Callable[P, go.Figure]:
    """Keep the figures that ``draw`` made last, by the values of its arguments.

    Nobody may change such a figure; a copy is made by ``go.Figure(figure)``. Arguments are compared
    rather than hashed: those of the same scene are the same objects, which takes no time. Tables
    are compared cell by cell.
    """
    kept: deque[tuple[tuple[Any, ...], dict[str, Any], go.Figure]] = deque(maxlen=KEPT)

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> go.Figure:
        mine = tuple(map(_own, args)), {name: _own(value) for name, value in kwargs.items()}
        for positional, named, figure in tuple(kept):  # another session may add one meanwhile
            if _alike(positional, mine[0]) and _alike(named, mine[1]):
                return figure
        figure = draw(*args, **kwargs)
        kept.append((*mine, figure))
        return figure

    return drawn


def _own(value: Any) -> Any:
    """Return a value that does not change if the caller adds to a list or a table later."""
    return value.copy() if isinstance(value, list | dict | set | pd.DataFrame) else value


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are equal; unlike ``==``, of tables among them too."""
    if one is other or isinstance(one, go.Figure):
        return one is other  # figures take longer to compare than to draw
    if isinstance(one, pd.DataFrame) or isinstance(other, pd.DataFrame):
        return isinstance(one, pd.DataFrame) and one.equals(other)
    if type(one) is type(other) is tuple:
        return len(one) == len(other) and all(map(_alike, one, other))
    if type(one) is type(other) is dict:
        return list(one) == list(other) and all(map(_alike, one.values(), other.values()))
    return bool(one == other)
