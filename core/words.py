"""Sizes, block numbers and outside text formatted for people, the same everywhere; no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

LINE_BREAKS = re.compile(r"[\r\n\t\f\v\x85\u2028\u2029]+")
_ESCAPED = re.compile(
    r"""
    [\\`*\[\]$~|]                                  # code, emphasis, links, images, math, tables
    | (?<![^\W_])_ | _(?![^\W_])                   # emphasis, not inside a word
    | <(?=[A-Za-z/!?])                             # HTML and autolinks
    | &(?=\#?\w+;)                                 # character references
    | ^\s*(?:[-+=](?=[-=\s]*$|\s)|\#{1,6}(?=\s|$)|>)   # lists, rules, headings, quotes
    """,
    re.VERBOSE,
)
_NUMBERED = re.compile(r"^(\s*\d{1,9})([.)])(?=\s|$)")


def markdown(text: object) -> str:
    """Return text from outside in Markdown that shows it letter for letter, in one line.

    Also in a cell of a table. A web address stays clickable, as its text is its target.
    """
    line = LINE_BREAKS.sub(" ", str(text))
    line = re.sub(r"^\s{2,}", " ", line)  # an indented line would be code
    line = _ESCAPED.sub(lambda m: m[0][:-1] + "\\" + m[0][-1], line)
    return _NUMBERED.sub(r"\1\\\2", line)


def size(count: float) -> str:
    """Format bytes to three digits in the unit that reads best: 512 B, 8.48 MiB, 12.6 GiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024:
            break
        count, unit = count / 1024, larger
    decimals = 0 if unit == "B" or abs(count) >= 99.95 else 1 if abs(count) >= 9.995 else 2
    return f"{count:,.{decimals}f} {unit}"


def duration(seconds: float) -> str:
    """Format a time span: 8 s, 3 min 5 s, 2 h 10 min, 3 days 4 h; forever if it has no end."""
    if not math.isfinite(seconds):
        return "forever"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} days {whole % 86400 // 3600} h"


def parameters(count: float, *, exact: bool = False) -> str:
    """Return a number of parameters as people say it: 134.5 M, 70.55 B.

    ``exact``: all its digits, as long as they fit a tile.
    """
    if count < (1e10 if exact else 1e6):
        return f"{count:,.0f}"
    value, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{value:.4g} {unit}"


def rounded(value: float | None) -> str:
    """Format a number to four digits, but never with an exponent if it is large: 64.39, 14,163."""
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:,.4g}"


def brief(seconds: float) -> str:
    """Format what takes milliseconds or seconds, to three digits: 110 ms, 14.2 s."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds:.3g} s"


def percent(share: float) -> str:
    """Format a share in whole percent; never -0%."""
    text = f"{share:.0%}"
    return "0%" if text == "-0%" else text


def listed(names: Sequence[str]) -> str:
    """Return names as a list in prose: a, b and c."""
    *first, last = names or [""]
    return f"{', '.join(first)} and {last}" if first else last


def block_ranges(blocks: Iterable[int]) -> str:
    """Format block numbers as ranges: 0 to 3, 6, 8 to 9 (a spreadsheet reads 0-3 as a date)."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)


def by_blocks(allowed: Mapping[str, tuple[int, ...]]) -> str:
    """Group names by their blocks: ``PPL+, LLM-Pruner in blocks 4 to 29; FLAP in 0 to 31``.

    Names without blocks are left out; the result is empty if none has any.
    """
    groups: dict[str, list[str]] = {}
    for name, blocks in allowed.items():
        if blocks:
            groups.setdefault(block_ranges(blocks), []).append(name)
    phrases = [f"{', '.join(names)} in {blocks}" for blocks, names in groups.items()]
    return "; ".join(phrases).replace(" in ", " in blocks ", 1)
