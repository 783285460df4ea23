"""What pages show of a generate run, as text and HTML; no Streamlit and no torch."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from core.data.diversity import Diversity
from core.generate.checks import REASONS
from core.generate.results import OWN, Pair, Summary
from core.words import duration, percent

KEPT, LEFT = "#009E73", "rgba(128,128,128,.5)"
SHOWN = 1200
"""Characters of a prompt or an answer."""


def tiles(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of a dry run as label -> text."""
    seconds = plan["seconds"]
    return {
        "Prompts": f"{plan['rows']:,}",
        "Prompt tokens": f"{plan['prompt_tokens']:,}",
        "New tokens, at most": f"{plan['most_new_tokens']:,}",
        "Memory": f"{plan['memory_mib']:,.0f} MiB",
        "Time, at most": "not known" if seconds is None else f"about {duration(seconds)}",
    }


def sentence(summary: Summary) -> str:
    """Return what became of a run's prompts."""
    failed = ", ".join(
        f"{count:,} {REASONS.get(why, why)}"
        for why, count in sorted(summary.reasons.items(), key=lambda item: -item[1])
    )
    dropped = f", {summary.dropped:,} left out without one" if summary.dropped else ""
    return (
        f"{summary.rows:,} rows: {summary.own:,} with the model's own answer, "
        f"{summary.references:,} with the reference because the answer failed the check{dropped}."
        + (f" Failed: {failed}." if failed else "")
    )


def measured(summary: Summary) -> str:
    """Return how the answers were written, and their length and variety beside the references'."""
    drawn = f"drawn at temperature {summary.temperature:g}" if summary.temperature else "greedy"
    speed = f"{summary.tokens_per_s:,.0f} new tokens/s" if summary.tokens_per_s else "no new tokens"
    return (
        f"Measured: {summary.new_tokens:,} new tokens, {drawn}, {speed} on {summary.device} "
        f"({summary.dtype}). Own answers: {variety(summary.own_text)}. "
        f"References: {variety(summary.reference_text)}."
    )


def variety(found: Diversity) -> str:
    """Return length, repetition and distinct-2 of texts in words."""
    if found.words is None:
        return "none"
    said = [f"{found.words:.0f} words"]
    if found.repetition is not None:
        said.append(f"{percent(found.repetition)} of 4-grams repeated")
    if found.distinct_2 is not None:
        said.append(f"distinct-2 {found.distinct_2:.2f}")
    return ", ".join(said)


def pair_html(pair: Pair) -> str:
    """Return a prompt with the reference and the model's own answer side by side."""
    why = REASONS.get(pair.why, pair.why)
    own = "kept" if pair.kept == OWN else f"not kept: {why}"
    reference = "kept" if pair.kept != OWN else "replaced"
    text = "white-space:pre-wrap;font-family:monospace;font-size:.85rem;line-height:1.5;"
    text += "overflow-wrap:anywhere"
    prompt = f'<div style="{text};opacity:.6;font-style:italic">{_cut(pair.prompt, end=True)}</div>'
    sides = "".join(
        f'<div style="flex:1 1 15rem;min-width:0;border-left:3px solid {KEPT if on else LEFT};'
        f'padding-left:.7rem"><div style="font-size:.8rem;opacity:.75">{title} ({told})</div>'
        f'<div style="{text}">{_cut(shown) or "(empty)"}</div></div>'
        for title, told, shown, on in (
            ("Reference", reference, pair.reference, pair.kept != OWN),
            ("Model's own answer", html.escape(own), pair.own, pair.kept == OWN),
        )
    )
    return (
        f'{prompt}<div style="display:flex;flex-wrap:wrap;gap:1rem;margin-top:.6rem">{sides}</div>'
    )


def _cut(text: str, *, end: bool = False) -> str:
    """Return text escaped; of a long one the start, or with ``end`` the end."""
    if len(text) > SHOWN:
        text = "… " + text[-SHOWN:] if end else text[:SHOWN] + " …"
    return html.escape(text)


def example_html(prompt: str, reference: str) -> str:
    """Return a prompt and its reference as HTML."""
    text = "white-space:pre-wrap;font-family:monospace;font-size:.85rem;line-height:1.5;"
    text += "overflow-wrap:anywhere;margin-bottom:.5rem"
    given = f'<div style="{text};opacity:.6;font-style:italic">{_cut(prompt, end=True)}</div>'
    return given + f'<div style="{text}">{_cut(reference) or "(no reference)"}</div>'
