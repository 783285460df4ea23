"""One palette for all charts: Okabe and Ito's colours, readable with every colour vision."""

from __future__ import annotations

from typing import Any

KEPT = "#0072B2"
DROPPED = "#D55E00"
PROTECTED = "#999999"
ACCENT = "#009E73"
SCALE = "Cividis"
FONT_SIZE = 13

CRITERIA = {
    "ppl": "#0072B2",
    "taylor": "#D55E00",
    "magnitude": "#009E73",
    "block_influence": "#CC79A7",
    "relative_update": "#E69F00",
}


def layout(height: int, **more: Any) -> dict[str, Any]:
    """Return the layout that all figures share."""
    return {
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 36, "b": 10},
        "font": {"size": FONT_SIZE},
        "legend": {"orientation": "h", "y": 1.08, "yanchor": "bottom", "x": 0},
        **more,
    }
