"""Pieces of a web page that needs nothing but itself: tables, figures, the page around them.

plotly.js is in the page once; every figure is JSON beside the place where it is drawn.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

KINDS = ("measured", "estimated", "published", "unknown", "out of memory")

STYLE = """
:root { color-scheme: light; --ink: #1B2733; --line: #D5DCE3; --soft: #F3F6F9; --blue: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 28px 60px; max-width: 1060px; background: #fff;
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2rem; margin: 0 0 4px; } h2 { margin: 44px 0 8px; padding-top: 8px;
  border-top: 2px solid var(--line); } h3 { margin: 26px 0 6px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 16px 0;
  list-style: none; }
a { color: #005F95; } a:focus-visible, summary:focus-visible { outline: 3px solid #E69F00; }
.skip { position: absolute; left: -999px; } .skip:focus { left: 8px; top: 8px; background: #fff; }
.note, figcaption { color: #47535F; font-size: .92rem; } figure { margin: 14px 0 22px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; width: 100%; }
caption { text-align: left; color: #47535F; padding: 4px 0; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; } th { background: var(--soft); } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; padding: 0; }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px;
  flex: 1 1 180px; }
.tiles dt { font-size: .9rem; color: #47535F; } .tiles dd { margin: 0; font-size: 1.7rem;
  font-weight: 600; } .tiles small { display: block; font-size: .85rem; font-weight: 400; }
.kind { border: 1px solid #47535F; border-radius: 4px; padding: 0 5px; font-size: .82rem;
  white-space: nowrap; } .kind.measured { border-style: solid; background: #E3F1FA; }
.kind.estimated { border-style: dashed; } .kind.published {
  border-style: double; border-width: 3px; }
.finding { border: 1px solid var(--line); border-left: 6px solid #D55E00; border-radius: 6px;
  padding: 8px 14px; margin: 12px 0; } .finding p { margin: 4px 0; }
pre { background: var(--soft); padding: 10px 14px; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .88rem/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; }
footer { margin-top: 50px; border-top: 2px solid var(--line); padding-top: 8px; }
@page { margin: 14mm; }
@media print { body { padding: 0; max-width: none; font-size: 11pt; } nav, .skip { display: none; }
  h2 { margin-top: 22px; } h2, h3, caption { break-after: avoid; } .wide { overflow: visible; }
  table { font-size: 8.5pt; } th, td { padding: 3px 5px; }
  figure, tr, .finding, .tiles div { break-inside: avoid; } details > * { display: block; }
  a { color: inherit; text-decoration: none; } .modebar { display: none !important; } }
"""

SCRIPT = """
const figures = [...document.querySelectorAll("script.figure")];
const plots = figures.map(spec => {
  const {data, layout} = JSON.parse(spec.textContent), place = spec.previousElementSibling;
  Plotly.newPlot(place, data, layout, {responsive: true, displaylogo: false,
    toImageButtonOptions: {scale: 3}});
  return place;
});
const fit = width => plots.forEach(p => Plotly.relayout(p, {width, autosize: !width}));
addEventListener("beforeprint", () => {
  fit(PRINT_WIDTH); document.querySelectorAll("details").forEach(d => { d.open = true; });
});
addEventListener("afterprint", () => fit(null));
""".replace("PRINT_WIDTH", "680")  # A4 between its margins, in CSS pixels


@dataclass(frozen=True)
class Section:
    """One chapter of the page."""

    id: str
    title: str
    parts: Sequence[str]


def text(value: Any) -> str:
    """Return a value as HTML text; None is a dash, kinds get a mark of their own."""
    if value is None or value == "":
        return '<span aria-label="none">-</span>'
    if isinstance(value, str) and value in KINDS:
        return f'<span class="kind {value.split()[0]}">{value}</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"
    if isinstance(value, (tuple, list)):
        return html.escape(", ".join(map(str, value)))
    return html.escape(str(value))


def paragraph(words: str, kind: str = "") -> str:
    """Return a paragraph; ``note`` as kind makes it small."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(words)}</p>"


def heading(words: str) -> str:
    """Return a heading below a section's own."""
    return f"<h3>{html.escape(words)}</h3>"


def table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    """Return a table with the rows' keys as columns; columns without a value are left out."""
    names = [n for n in (rows[0] if rows else {}) if any(r.get(n) not in (None, "") for r in rows)]
    if not names:
        return ""
    numeric = {n for n in names if all(_is_number(r.get(n)) for r in rows)}
    mark = {n: ' class="n"' if n in numeric else "" for n in names}
    head = "".join(f'<th scope="col"{mark[n]}>{html.escape(n)}</th>' for n in names)
    body = "".join(
        f"<tr>{''.join(f'<td{mark[n]}>{text(row.get(n))}</td>' for n in names)}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def facts(values: Mapping[str, Any], caption: str) -> str:
    """Return a table of two columns: what, and its value."""
    rows = [{"what": k, "value": v} for k, v in values.items() if v not in (None, "", ())]
    return table(rows, caption)


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Return large figures side by side: label -> (figure, how it is known)."""
    cells = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(figure)}"
        f"<small>{html.escape(how)}</small></dd></div>"
        for label, (figure, how) in values.items()
    )
    return f'<dl class="tiles">{cells}</dl>'


def figure(chart: go.Figure, alt: str, note: str) -> str:
    """Return a chart with its accessible name and the line below it."""
    drawn = go.Figure(chart).update_layout(template="plotly_white")
    spec = str(drawn.to_json()).replace("</", "<\\/")
    return (
        f'<figure><div class="plot" role="img" aria-label="{html.escape(alt)}"></div>'
        f'<script type="application/json" class="figure">{spec}</script>'
        f"<figcaption>{html.escape(note)}</figcaption></figure>"
    )


def code(lines: Sequence[str]) -> str:
    """Return lines of a shell."""
    return f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>"


def page(title: str, lead: Sequence[str], sections: Sequence[Section], foot: str) -> str:
    """Return the whole page; ``lead`` are HTML parts below the title."""
    links = "".join(f'<li><a href="#{s.id}">{html.escape(s.title)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.id}" aria-labelledby="{s.id}-title"><h2 id="{s.id}-title">'
        f"{html.escape(s.title)}</h2>{''.join(s.parts)}</section>"
        for s in sections
    )
    draws = any('class="figure"' in part for s in sections for part in s.parts)
    scripts = f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script>" if draws else ""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style></head><body><a class="skip" href="#content">To the content</a>'
        f"<header><h1>{html.escape(title)}</h1>{''.join(lead)}</header>"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav><main id="content">{body}</main>'
        f"<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>"
        f'<footer class="note">{html.escape(foot)}</footer>{scripts}</body></html>\n'
    )
