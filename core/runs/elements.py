"""Independent steps of a recipe that other processes carry out: which ones, and how far they are.

A recipe at a cluster that comes to steps which do not need one another writes them to
``.run/array.json`` and hands over. The machine that submits jobs makes them one job array
(`core.places.array`) and notes its state in the same file, so that another process goes on if that
one is killed. Then the recipe continues: it takes what those steps left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.runs import workspace

FILE = "array.json"
WANTED = "DEPTHCUT_ARRAYS"
"""Environment variable with which a place asks recipes to hand independent steps over."""
MOST = 4096


@dataclass(frozen=True)
class Element:
    """One step: its folder below the recipe's, its command, and that command's options."""

    name: str
    command: str
    words: tuple[str, ...]
    """What follows ``python -m core COMMAND``."""
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Elements:
    """The independent steps that a recipe handed over last."""

    elements: tuple[Element, ...]
    indices: tuple[int, ...] = ()
    """Those that the latest array carries out; the number of an element is its index."""
    rounds: int = 0
    """How many arrays were submitted: elements that reach their time limit continue in the next."""
    key: str = ""
    """What the latest array is known by in SLURM, noted before it is submitted."""
    job: str = ""
    ended: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the steps."""
        return tuple(element.name for element in self.elements)

    def write(self, book: Path) -> None:
        """Write the file into a recipe's bookkeeping."""
        workspace.write_json(book / FILE, asdict(self), parents=False)

    def noted(self, book: Path, **changes: Any) -> Elements:
        """Return these elements with ``changes``, which are written first."""
        new = replace(self, **changes)
        new.write(book)
        return new


def read(book: Path) -> Elements | None:
    """Read the file from a recipe's bookkeeping; None if there is none that can be read."""
    found = workspace.read_json(book / FILE) or {}
    try:
        made = tuple(
            Element(str(e["name"]), str(e["command"]), tuple(map(str, e["words"])), dict(e["spec"]))
            for e in found["elements"][:MOST]
        )
        return Elements(
            made,
            indices=tuple(i for i in map(int, found["indices"]) if 0 <= i < len(made)),
            rounds=int(found["rounds"]),
            key=str(found["key"]),
            job=str(found["job"]),
            ended=found["ended"] is True,
        )
    except (KeyError, TypeError, ValueError):
        return None


def pending(book: Path) -> Elements | None:
    """Return the elements that were handed over and have not all ended."""
    found = read(book)
    return None if found is None or found.ended else found


def ended(book: Path, names: Sequence[str]) -> bool:
    """Whether exactly these steps were handed over, and all have ended."""
    found = read(book) if wanted() else None
    return found is not None and found.ended and set(names) <= set(found.names)


def wanted() -> bool:
    """Whether this process runs at a place that carries independent steps out at once."""
    return bool(os.environ.get(WANTED))
