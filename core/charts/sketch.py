"""A figure in the making: what charts say of it, as plain values, until it is finished.

`go.Figure` checks every part that is added and every change of an axis, which takes ten times as
long as all the rest; a click on a block waits for three figures. A test draws them with both.
"""

from __future__ import annotations

import functools
from typing import Any

import plotly.graph_objects as go
import plotly.io


@functools.lru_cache(maxsize=4)
def _empty(_: str) -> dict[str, Any]:
    """Return the layout of an empty figure: the template of this name, which Streamlit sets."""
    layout: dict[str, Any] = go.Figure().to_dict()["layout"]
    return layout


class Sketch:
    """Traces and layout of a figure, with those calls of `go.Figure` that charts use.

    As there, None takes a setting back, ``title`` may be a text, and ``title_font`` is within it.
    """

    def __init__(self) -> None:
        """Begin an empty figure."""
        self.data: list[dict[str, Any]] = []
        self._layout = dict(_empty(str(plotly.io.templates.default)))

    def add_bar(self, **trace: Any) -> None:
        """Add bars."""
        self.data.append(_merged({}, trace) | {"type": "bar"})

    def add_scatter(self, **trace: Any) -> None:
        """Add points or lines."""
        self.data.append(_merged({}, trace) | {"type": "scatter"})

    def add_shape(self, **shape: Any) -> None:
        """Add a line or an area."""
        self._layout["shapes"] = [*self._layout.get("shapes", ()), _merged({}, shape)]

    def add_annotation(self, **note: Any) -> None:
        """Add a text."""
        self._layout["annotations"] = [*self._layout.get("annotations", ()), _merged({}, note)]

    def update_xaxes(self, **axis: Any) -> None:
        """Change the horizontal axis."""
        self.update_layout(xaxis=axis)

    def update_yaxes(self, **axis: Any) -> None:
        """Change the vertical axis."""
        self.update_layout(yaxis=axis)

    def update_layout(self, **layout: Any) -> None:
        """Change the layout."""
        self._layout = _merged(self._layout, layout)

    def finished(self) -> go.Figure:
        """Return the figure."""
        return go.Figure({"data": self.data, "layout": self._layout}, _validate=False)


def _merged(before: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with changes to some, at every depth."""
    found = dict(before)
    for name, value in changes.items():
        if name == "title_font":
            name, value = "title", {"font": value}
        elif name == "title" and isinstance(value, str):
            value = {"text": value}
        if value is None:
            found.pop(name, None)
        elif isinstance(value, dict):
            inner = found.get(name)
            found[name] = _merged(inner if isinstance(inner, dict) else {}, value)
        else:
            found[name] = value
    return found
