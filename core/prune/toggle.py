"""The toggle pad's logic: the chosen blocks after a click, a pill or a shared URL.

Pure functions on tuples of block numbers in the order they were chosen; the page only draws what
these return. No Streamlit here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.errors import OptionError
from core.runs.spec import parse_numbers

Blocks = tuple[int, ...]


def toggle(chosen: Sequence[int], block: int) -> Blocks:
    """Return ``chosen`` without ``block`` if it contains it, otherwise with it at the end."""
    if block in chosen:
        return tuple(b for b in chosen if b != block)
    return (*chosen, block)


def clicked_blocks(event: Mapping[str, Any] | None) -> Blocks:
    """Return the blocks of a chart's selection event, each once, in the order of its points.

    A point's block is the first entry of its ``customdata`` list, or else its ``x``. Points
    without a block are skipped.
    """
    selection = (event or {}).get("selection") or {}
    found: list[int] = []
    for point in selection.get("points") or ():
        data = point.get("customdata")
        value = data[0] if isinstance(data, (list, tuple)) and data else data
        value = point.get("x") if value is None else value
        try:
            block = int(value)
        except (TypeError, ValueError):
            continue
        if block not in found:
            found.append(block)
    return tuple(found)


def pair_of(point: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Return the two blocks that a point's ``customdata`` begins with; None if there are not."""
    data = (point or {}).get("customdata")
    try:
        first, second = (int(value) for value in data[:2])  # type: ignore[index]
    except (TypeError, ValueError):
        return None
    return (first, second) if first != second else None


def both(chosen: Sequence[int], pair: tuple[int, int]) -> Blocks:
    """Return ``chosen`` with both blocks of ``pair``, or without them if it has both."""
    if set(pair) <= set(chosen):
        return tuple(block for block in chosen if block not in pair)
    return (*chosen, *(block for block in sorted(pair) if block not in chosen))


def newly(named: Sequence[int], before: Sequence[int]) -> Blocks:
    """Return the clicked blocks without those of the previous click.

    A chart that is redrawn late on a busy machine still holds the previous selection. A second
    click on the same block alone counts as a click.
    """
    return tuple(b for b in named if b not in before) or tuple(named)


def click(chosen: Sequence[int], named: Sequence[int], blocks: int) -> Blocks:
    """Return the choice after a click on the blocks ``named``, which may be empty."""
    result = tuple(chosen)
    for block in named:
        if 0 <= block < blocks:
            result = toggle(result, block)
    return result


def follow(chosen: Sequence[int], wanted: Iterable[int]) -> Blocks:
    """Return the blocks of ``wanted``: already chosen ones in their order, then new ones."""
    target = list(wanted)
    kept = tuple(b for b in chosen if b in target)
    return (*kept, *(b for b in dict.fromkeys(target) if b not in kept))


def to_text(chosen: Sequence[int]) -> str:
    """Return ``3,5``, the form used in the URL and on the command line."""
    return ",".join(str(b) for b in chosen)


def from_text(text: str) -> Blocks:
    """Read ``3,5`` or ``4-8`` from a URL; raises `OptionError` as the command line does.

    Duplicates count once. Blocks that are out of range are kept: the page reports them with the
    command's own message.
    """
    if len(text) > 2000:
        raise OptionError("--drop: the list is longer than 2000 characters.", "Use 3,5 or 1-8.")
    for part in text.split(","):
        _, dash, last = part.partition("-")
        if dash and last.strip().isdigit() and int(last) > 100_000:
            raise OptionError(f"--drop: the range '{part}' is too long.", "Use 3,5 or 1-8.")
    return tuple(dict.fromkeys(parse_numbers(text, "--drop")))
