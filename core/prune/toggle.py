"""The toggle pad's logic: what is chosen after a click, a pill or a shared URL.

Pure functions on tuples of block numbers in the order they were chosen, and on a `Removal` of
blocks and parts of blocks, in which a block is listed at most once; the page only draws what these
return. No Streamlit here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core import outside
from core.checkpoint.drop import PARTS, Removal
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


def clicked_parts(event: Mapping[str, Any] | None) -> tuple[tuple[int, str], ...]:
    """Return the (block, attention or mlp) of the points of a selection event whose data names one.

    Their ``customdata`` begins with the two.
    """
    selection = (event or {}).get("selection") or {}
    found = [point.get("customdata") for point in selection.get("points") or ()]
    named = [data for data in found if isinstance(data, (list, tuple)) and len(data) > 1]
    return tuple((int(data[0]), str(data[1])) for data in named if data[1] in PARTS)


def toggle_part(chosen: Removal, block: int, part: str) -> Removal:
    """Return ``chosen`` with ``part`` of ``block`` removed, or kept if it was removed.

    A block without both parts is dropped whole.
    """
    gone = {name for name in PARTS if chosen.misses(block, name)} ^ {part}
    rest = with_drop(chosen, (b for b in chosen.drop if b != block))
    kept = {name: tuple(b for b in getattr(rest, name) if b != block) for name in PARTS}
    if len(gone) == len(PARTS):
        return with_drop(
            Removal(rest.drop, **kept, width=rest.width, order=rest.order), (*rest.drop, block)
        )
    kept |= {name: (*kept[name], block) for name in gone}
    width = tuple(one for one in rest.width if one[0] not in kept["mlp"])
    return Removal(rest.drop, **kept, width=width, order=rest.order)


def with_drop(chosen: Removal, drop: Iterable[int]) -> Removal:
    """Return ``chosen`` with ``drop`` as its whole blocks, of which no part is listed any more."""
    blocks = tuple(drop)
    attention, mlp = (tuple(b for b in getattr(chosen, name) if b not in blocks) for name in PARTS)
    width = tuple(one for one in chosen.width if one[0] not in blocks)
    return Removal(blocks, attention, mlp, width, chosen.order)


def follow_part(chosen: Removal, part: str, wanted: Iterable[int]) -> Removal:
    """Return ``chosen`` with ``part`` alone removed from exactly the blocks of ``wanted``.

    Of blocks that are dropped whole nothing changes.
    """
    target = set(wanted)
    for block in sorted({*getattr(chosen, part)} ^ target):
        if block not in chosen.drop:
            chosen = toggle_part(chosen, block, part)
    return chosen


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


def options_of(removal: Removal) -> dict[str, Any]:
    """Return ``removal`` as options of prune and of the recipe make; empty ones are left out."""
    found: dict[str, Any] = {
        "drop": removal.drop,
        "attention": removal.attention,
        "mlp": removal.mlp,
        "mlp_width": tuple(f"{block}:{count}" for block, count in removal.width),
        "neurons": removal.order if removal.width else "",
    }
    return {name: value for name, value in found.items() if value}


def width_to_text(width: Sequence[tuple[int, int]]) -> str:
    """Return ``3:768,5:384``, the form of narrower MLPs in the URL and on the command line."""
    return ",".join(f"{block}:{neurons}" for block, neurons in width)


def width_from_text(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``3:768,5:384``; raises `OptionError` as the command line does."""
    found = []
    for item in filter(None, (part.strip() for part in text[:20_000].split(","))):
        block, _, count = item.partition(":")
        if not (block.strip().isdecimal() and count.strip().isdecimal() and len(item) < 20):
            raise OptionError(
                f"--mlp-width: '{outside.brief(item)}' is not block:neurons.",
                "Use e.g. 3:768 for 768 neurons of block 3.",
            )
        found.append((int(block), int(count)))
    return tuple(found)


_LISTS = {"attention": "attention", "mlp": "mlp", "width": "width", "neurons": "order"}
"""Name in a removal's text -> field of `Removal`."""


def removal_to_text(removal: Removal) -> str:
    """Return ``3,5;attention=7;mlp=2``, the form of a removal in one field of a URL.

    Narrower MLPs are ``width=3:768`` and the run that ranked their neurons, ``neurons=RUN``.
    """
    found = [to_text(removal.drop)] if removal.drop else []
    for name, field in _LISTS.items():
        value: Any = getattr(removal, field)
        if field == "width":
            value = width_to_text(value)
        elif field == "order":
            value = value if removal.width else ""
        else:
            value = to_text(value)
        found += [f"{name}={value}"] if value else []
    return ";".join(found)


def removal_from_text(text: str) -> Removal:
    """Read what `removal_to_text` writes, and ``3,5; attention 7`` as people type it.

    Raises `OptionError` for what is neither.
    """
    values: dict[str, Any] = {"drop": ()}
    for piece in filter(None, (part.strip() for part in text[:20_000].split(";"))):
        name, _, value = piece.replace("=", " ", 1).partition(" ")
        field = _LISTS.get(name.lower())
        if field is None:
            values["drop"] = (*values["drop"], *from_text(piece))
        elif field == "width":
            values[field] = width_from_text(value)
        else:
            values[field] = value.strip() if field == "order" else from_text(value)
    return Removal(**values)


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
