"""Dense checkpoints with everything that runs made from them.

Read from pruning.json and the runs' specs; nothing is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core import outside
from core.checkpoint import locate
from core.runs import workspace
from core.runs.workspace import RunRecord
from core.study import variants
from core.study.kinds import Variant
from core.study.states import state_of

CUTTERS = ("prune", "width")


@dataclass(frozen=True)
class Lineage:
    """A dense checkpoint and everything made from it."""

    variants: tuple[Variant, ...]
    """The dense one first, then by age; ``parent`` links each to what it was made from."""

    @property
    def dense(self) -> Variant:
        """The checkpoint that everything descends from."""
        return self.variants[0]

    def children(self, variant: Variant) -> list[Variant]:
        """Return what was made from a variant directly, oldest first."""
        return self._children.get(variant.id, [])

    @functools.cached_property
    def _children(self) -> dict[str, list[Variant]]:
        found: dict[str, list[Variant]] = {}
        for variant in self.variants[1:]:
            found.setdefault(variant.parent, []).append(variant)
        return found

    def walk(self, start: Variant | None = None, depth: int = 0) -> Iterator[tuple[int, Variant]]:
        """Yield a variant (the dense one) and everything made from it, each with its depth."""
        start = start or self.dense
        yield depth, start
        for child in self.children(start):
            yield from self.walk(child, depth + 1)

    @property
    def total_bytes(self) -> int:
        """Disk use of all runs in it."""
        return sum(v.disk_bytes for v in self.variants if v.record)

    def at(self, name: str) -> Variant | None:
        """Return the variant whose checkpoint ``name`` means."""
        local = locate.local_folder(name)
        wanted = local.resolve() if local else None
        for variant in self.variants:
            named = variant.record is None and variant.id == name
            if named or (wanted and variant.folder and variant.folder.resolve() == wanted):
                return variant
        return None


def lineages(records: Sequence[RunRecord]) -> list[Lineage]:
    """Return a lineage for every dense checkpoint that runs were made from.

    A run is a child of the run whose folder its spec names, else of a dense checkpoint. A parent
    that was deleted stays by its name. Kept until one of the runs or of their files changes.
    """
    makers = sorted((r for r in records if r.command in workspace.MAKERS), key=lambda r: r.started)
    key, state = (workspace.default_root().absolute(), len(makers)), state_of(makers)
    kept = _kept.get(key)
    if kept is None or kept[0] != state:
        kept = (state, tuple(_lineages(makers)))
        while len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = kept
    return list(kept[1])


KEPT = 8
_kept: dict[tuple[Path, int], tuple[object, tuple[Lineage, ...]]] = {}
"""The lineages asked for last, by workspace and number of runs, with the state of these."""


def _lineages(makers: Sequence[RunRecord]) -> list[Lineage]:
    by_folder = {r.path.resolve(): r for r in makers}
    below: dict[Path, list[RunRecord]] = {}
    roots: dict[str, tuple[str, list[RunRecord]]] = {}
    for record in makers:
        name = str(record.spec.get("checkpoint") or "")
        parent = _owner(name, by_folder)
        if parent is None or parent is record:
            roots.setdefault(_root_key(name), (name, []))[1].append(record)
        else:
            below.setdefault(parent.path, []).append(record)
    return [_lineage(variants.dense(name), first, below) for name, first in roots.values()]


def lineage_of(name: str, records: Sequence[RunRecord]) -> Lineage:
    """Return the lineage that checkpoint ``name`` is in, or one of its own."""
    found = (lineage for lineage in lineages(records) if lineage.at(name))
    return next(found, None) or Lineage((variants.dense(name),))


def made_from(records: Sequence[RunRecord], name: str) -> list[RunRecord]:
    """Return the runs that cut the checkpoint ``name``, or what was made of it; newest first."""
    for lineage in lineages(records):
        if top := lineage.at(name):
            below = [v.record for _, v in lineage.walk(top) if v is not top and v.record]
            cut = [r for r in below if r.command in CUTTERS]
            return sorted(cut, key=lambda r: r.started, reverse=True)
    return []


def _lineage(
    root: Variant, first: Sequence[RunRecord], below: dict[Path, list[RunRecord]]
) -> Lineage:
    found: list[Variant] = []
    waiting = [(record, root) for record in first]
    while waiting:
        record, parent = waiting.pop(0)
        variant = variants.made(record, parent, root)
        found.append(variant)
        waiting += [(child, variant) for child in below.get(record.path, ())]
    found.sort(key=lambda v: v.record.started if v.record else 0.0)
    return Lineage(tuple(_distinct([root, *found])))


def _owner(name: str, by_folder: dict[Path, RunRecord]) -> RunRecord | None:
    """Return the run that owns the folder ``name`` means: itself or something in it."""
    for start in (outside.path_of(name), workspace.default_root() / name):
        path = start.resolve()
        for candidate in (path, *path.parents):
            if candidate in by_folder:
                return by_folder[candidate]
    return None


def _root_key(name: str) -> str:
    folder = locate.local_folder(name)
    return str(folder.resolve()) if folder else name


def _distinct(found: list[Variant]) -> list[Variant]:
    """Make labels unique: repeated ones are numbered from the second on."""
    seen: dict[str, int] = {}
    result = []
    for variant in found:
        count = seen[variant.label] = seen.get(variant.label, 0) + 1
        result.append(
            replace(variant, label=f"{variant.label} ({count})") if count > 1 else variant
        )
    return result
