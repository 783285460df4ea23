"""Parts of a self-contained web page, and the page made of them.

A part is data; the templates in ``templates/`` turn it into HTML and escape every text. plotly.js
is in the page once; every figure is JSON next to the element that shows it. The style is in
``report.css``, the script in ``report.js``; both are copied into the page.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from core.words import rounded

HERE = Path(__file__).parent
KINDS = ("measured", "estimated", "published", "unknown", "did not fit")
"""Values that are drawn as labels in tables."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    name: ClassVar[str] = "paragraph"
    text: str
    note: bool = False
    """In smaller type."""


@dataclass(frozen=True)
class Heading:
    """A heading below a section's own."""

    name: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Table:
    """A table; see `table` and `facts`."""

    name: ClassVar[str] = "table"
    rows: Sequence[Mapping[str, Any]]
    columns: Mapping[str, bool]
    """Name -> whether it holds numbers, which are aligned to the right."""
    caption: str


@dataclass(frozen=True)
class Tiles:
    """Large figures side by side."""

    name: ClassVar[str] = "tiles"
    figures: Mapping[str, tuple[str, str]]
    """Label -> (figure, how it is known)."""


@dataclass(frozen=True)
class Figure:
    """A chart with its accessible name and the line below it."""

    name: ClassVar[str] = "figure"
    chart: go.Figure
    alt: str
    note: str


@dataclass(frozen=True)
class Code:
    """Lines of a shell."""

    name: ClassVar[str] = "code"
    lines: Sequence[str]


@dataclass(frozen=True)
class Remark:
    """A finding, with its evidence in a section that unfolds."""

    name: ClassVar[str] = "remark"
    sentence: str
    try_next: str
    evidence: Sequence[Part]


@dataclass(frozen=True)
class Beside:
    """Pieces of HTML side by side, each with a title; whoever makes them escapes their text."""

    name: ClassVar[str] = "beside"
    pieces: Sequence[tuple[str, str]]
    """Title and HTML."""

    @property
    def marked(self) -> list[tuple[str, Markup]]:
        """The pieces, as what a template does not escape again."""
        return [(title, Markup(piece)) for title, piece in self.pieces]


Part = Paragraph | Heading | Table | Tiles | Figure | Code | Remark | Beside


@dataclass(frozen=True)
class Section:
    """One chapter of the page."""

    id: str
    title: str
    parts: Sequence[Part]


def table(rows: Sequence[Mapping[str, Any]], caption: str) -> list[Part]:
    """Return a table with the rows' keys as columns; an empty list if no row has a value.

    Columns without a value are left out.
    """
    names = [n for n in (rows[0] if rows else {}) if any(r.get(n) not in (None, "") for r in rows)]
    columns = {n: all(_is_number(r.get(n)) for r in rows) for n in names}
    return [Table(rows, columns, caption)] if columns else []


def facts(values: Mapping[str, Any], caption: str) -> list[Part]:
    """Return a table of names and values; an empty list if there are no values."""
    rows = [{"what": k, "value": v} for k, v in values.items() if v not in (None, "", ())]
    return table(rows, caption)


def page(title: str, lead: Sequence[Part], sections: Sequence[Section], foot: str) -> str:
    """Return the whole page; ``lead`` are the parts below the title."""
    draws = any(isinstance(part, Figure) for section in sections for part in section.parts)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            lead=lead,
            sections=sections,
            foot=foot,
            style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
            script=Markup((HERE / "report.js").read_text(encoding="utf-8")),
            plotly=Markup(get_plotlyjs()) if draws else "",
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    environment.tests["kind"] = lambda value: isinstance(value, str) and value in KINDS
    # tojson escapes what plotly returns, so that no text of a figure can end its script element
    environment.policies["json.dumps_function"] = _figure_json
    return environment


def _figure_json(chart: go.Figure, **_: Any) -> str:
    return str(go.Figure(chart).update_layout(template="plotly_white").to_json())


def _plain(value: Any) -> str:
    """Return a table's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
