"""Variants as a tree: dense checkpoint, what was cut from it, what was made from that.

Read from pruning.json and the runs' specs; nothing is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.checkpoint import locate
from core.prune.results import Pruning
from core.runs import workspace
from core.runs.workspace import RunRecord

CUTTERS = ("prune", "width")


@dataclass
class Variant:
    """One checkpoint of the tree: a dense one (``record`` None) or a run that made one."""

    label: str
    record: RunRecord | None
    folder: Path | None
    parent: str = ""
    """What the run took, as its spec has it; for a dense checkpoint its own name."""
    dropped: tuple[int, ...] = ()
    blocks: int | None = None
    parameters: int | None = None
    ratio: float | None = None
    children: list[Variant] = field(default_factory=list)

    def walk(self, depth: int = 0) -> Iterable[tuple[int, Variant]]:
        """Yield this variant and everything below it, with how deep it hangs."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    @functools.cached_property
    def disk_bytes(self) -> int:
        """Disk use of the run, or of the dense checkpoint's folder; counted when asked for."""
        folder = self.record.path if self.record else self.folder
        return workspace.disk_bytes(folder) if folder else 0

    @property
    def total_bytes(self) -> int:
        """Disk use of all runs below and of this one."""
        return sum(v.disk_bytes for _, v in self.walk() if v.record)


def tree(records: Sequence[RunRecord]) -> list[Variant]:
    """Return the dense checkpoints that runs were made from, each with its variants below it.

    A run hangs below the run whose folder its spec names, else below a dense checkpoint. A parent
    that was deleted stays in the tree by its name.
    """
    makers = (r for r in records if r.command in workspace.MAKERS)
    made = [_variant(r) for r in sorted(makers, key=lambda r: r.started)]
    by_folder = {v.record.path.resolve(): v for v in made if v.record}
    roots: dict[str, Variant] = {}
    for variant in made:
        parent = _owner(variant.parent, by_folder)
        if parent is None or parent is variant:
            key = _root_key(variant.parent)
            if key not in roots:
                roots[key] = dense(variant.parent)
            parent = roots[key]
        parent.children.append(variant)
    return list(roots.values())


def made_from(records: Sequence[RunRecord], name: str) -> list[RunRecord]:
    """Return the runs that cut the checkpoint ``name``, or what was made of it; newest first."""
    local = locate.local_folder(name)
    wanted = local.resolve() if local else None
    for root in tree(records):
        for _, node in root.walk():
            named = node.record is None and node.parent == name
            if named or (wanted and node.folder and node.folder.resolve() == wanted):
                below = [v.record for _, v in node.walk() if v is not node and v.record]
                cut = [r for r in below if r.command in CUTTERS]
                return sorted(cut, key=lambda r: r.started, reverse=True)
    return []


def _owner(name: str, by_folder: dict[Path, Variant]) -> Variant | None:
    """Return the run that owns the folder ``name`` means: itself or something in it."""
    for start in (Path(name).expanduser(), workspace.default_root() / name):
        path = start.resolve()
        for candidate in (path, *path.parents):
            if candidate in by_folder:
                return by_folder[candidate]
    return None


def _root_key(name: str) -> str:
    folder = locate.local_folder(name)
    return str(folder.resolve()) if folder else name


def dense(name: str) -> Variant:
    """Return a dense checkpoint as the root of a tree; ``name`` is what runs call it."""
    folder = locate.local_folder(name)
    label = name if folder is None or name == "demo" else folder.name
    root = Variant(label, None, folder, name)
    config = workspace.read_json(folder / "config.json") if folder else None
    blocks = (config or {}).get("num_hidden_layers")
    root.blocks = blocks if isinstance(blocks, int) else None
    return root


def _variant(record: RunRecord) -> Variant:
    cut = Pruning.read(record.path) or Pruning()
    merged = record.path / "merged"
    holder = merged if (merged / "config.json").is_file() else record.path
    return Variant(
        label=record.name,
        record=record,
        folder=holder if (holder / "config.json").is_file() else None,
        parent=str(record.spec.get("checkpoint") or ""),
        dropped=cut.dropped or tuple(record.spec.get("drop") or ()),
        blocks=cut.blocks_after,
        parameters=cut.parameters_after,
        ratio=cut.ratio,
    )
