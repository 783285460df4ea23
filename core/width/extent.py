"""Which blocks a width run may cut, separately for attention and MLP; no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from core import outside
from core.checkpoint.drop import PARTS as DROP_PARTS
from core.errors import OptionError

PARTS = ("both", "attention", "mlp")
_RANGE = re.compile(r"([0-9]{0,9}):([0-9]{0,9})")
_SPAN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_HOW = "Use 4:30 for blocks 4 to 29, or a list such as 3,5,8-12."


@dataclass(frozen=True)
class Extent:
    """The blocks whose attention and whose MLP may be cut, ascending."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of which any part may be cut, ascending."""
        return tuple(sorted({*self.attention, *self.mlp}))

    @property
    def parts(self) -> str:
        """Both, attention or mlp: what may be cut at all."""
        if self.attention and self.mlp:
            return "both"
        return "attention" if self.attention else "mlp"


def read(
    usual: Sequence[int],
    blocks: int,
    *,
    parts: str = "both",
    layers: str | None = None,
    attention: str | None = None,
    mlp: str | None = None,
    lacking: Mapping[str, Collection[int]] | None = None,
) -> Extent:
    """Return the blocks to cut in a model of ``blocks`` blocks.

    Args:
        usual: The method's own blocks, taken if none are given.
        blocks: The model's number of blocks.
        parts: both, attention or mlp.
        layers: Blocks of both parts, as for `numbers`.
        attention: Blocks whose attention is cut, in place of ``layers``.
        mlp: Blocks whose MLP is cut, in place of ``layers``.
        lacking: The blocks without attention, and those without an MLP. They are left out unless
            they are named for that part.

    Raises:
        OptionError: Blocks outside the model, blocks of a part that ``parts`` excludes or that they
            lack, or nothing to cut at all.
    """
    both = numbers(layers, blocks, "--layers") if layers else tuple(usual)
    found: dict[str, tuple[int, ...]] = {}
    for part, given in (("attention", attention), ("mlp", mlp)):
        flag = f"--{part}-layers"
        if parts not in ("both", part):
            if given:
                raise OptionError(
                    f"{flag} {outside.brief(given)} has no effect with --parts {parts}.",
                    f"Leave it out, or use --parts both or {part}.",
                )
            found[part] = ()
            continue
        without = (lacking or {}).get(part, ())
        if not given:
            found[part] = tuple(block for block in both if block not in without)
            continue
        found[part] = numbers(given, blocks, flag)
        if missing := [block for block in found[part] if block in without]:
            raise OptionError(
                f"{flag} {outside.brief(given)}: block {missing[0]} has no {DROP_PARTS[part]}.",
                "Leave it out.",
            )
    if not any(found.values()):
        what = "attention or MLP" if parts == "both" else DROP_PARTS[parts]
        raise OptionError(
            f"None of the blocks to prune has {'an ' * (parts == 'mlp')}{what}.",
            "Choose other --layers or --parts.",
        )
    return Extent(found["attention"], found["mlp"])


def numbers(text: str, blocks: int, flag: str) -> tuple[int, ...]:
    """Return the blocks that ``text`` names, ascending, each once.

    ``first:end`` as in Python (4:30 is blocks 4 to 29), single numbers, and ranges with both ends
    (8-12), separated by commas. Raises `OptionError`, which names ``flag``.
    """
    shown = outside.brief(text)
    found: set[int] = set()
    for item in (i.strip() for i in text.split(",") if i.strip()):
        if sliced := _RANGE.fullmatch(item):
            first = int(sliced[1] or 0)
            end = int(sliced[2]) if sliced[2] else blocks
        elif span := _SPAN.fullmatch(item):
            first = int(span[1])
            end = int(span[2] or first) + 1
        else:
            raise OptionError(f"{flag}: '{outside.brief(item)}' is not a block or a range.", _HOW)
        if end > blocks or first >= blocks:
            raise OptionError(
                f"{flag} {shown} goes beyond the model, which has blocks 0 to {blocks - 1}.",
                f"The maximum is 0:{blocks}; the end is not included.",
            )
        if first >= end:
            raise OptionError(f"{flag} {shown} is empty.", _HOW)
        found.update(range(first, end))
    if not found:
        raise OptionError(f"{flag} {shown} is empty.", _HOW)
    return tuple(sorted(found))
