"""The checkpoints of a study, and how they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from core.checkpoint import locate
from core.prune.plan import default_protection, unprotected
from core.prune.results import Pruning
from core.retrain.spec import LABELS as RETRAINED
from core.study import variants
from core.study.kinds import Variant, criterion_label, width_label
from core.width.results import WidthPruning


def root_of(roots: Sequence[variants.Variant], name: str) -> variants.Variant:
    """Return the tree that ``name`` is in, or a tree of its own."""
    local = locate.local_folder(name)
    wanted = local.resolve() if local else None
    for root in roots:
        for _, node in root.walk():
            named = node.record is None and node.parent == name
            if named or (wanted and node.folder and node.folder.resolve() == wanted):
                return root
    return variants.dense(name)


def checkpoints(root: variants.Variant) -> list[Variant]:
    """Return the study's checkpoints, the dense one first."""
    total = locate.at(root.folder).info.parameters if root.folder else None
    dense = Variant(root.parent, root.label, "dense", "", "dense", folder=root.folder)
    dense = replace(dense, parameters=total, ratio=0.0)
    found, parents = [dense], {id(root): dense}
    for _, node in root.walk():
        for child in node.children:
            parents[id(child)] = made = _made(child, parents[id(node)], total, root.blocks)
            found.append(made)
    head, *rest = found
    rest.sort(key=lambda v: v.record.started if v.record else 0.0)
    return _distinct([head, *rest])


def _made(
    node: variants.Variant, parent: Variant, total: int | None, blocks: int | None
) -> Variant:
    """Return the variant that a run left behind; the dense one has ``total`` parameters."""
    record = node.record
    assert record is not None
    cut = cut_of(record.path)
    left = node.parameters or parent.parameters
    ratio = 1 - left / total if left and total else cut.ratio
    base = Variant(
        record.id, record.name, parent.kind, parameters=left, ratio=ratio, parent=parent.id,
        folder=node.folder, record=record,
    )  # fmt: skip
    share = f" {ratio:.0%}" if ratio else ""
    if record.command == "retrain":
        names = ("method", "method_label", "dropped", "cut_in")
        kept = {name: getattr(parent, name) for name in names}
        method = str(record.spec.get("method") or "")
        label = f"{parent.label} + {RETRAINED.get(method, method)}"
        made = replace(base, retrained=method, **kept)
    elif record.command == "width":
        method = str(cut.method or record.spec.get("method") or "width")
        named = width_label(method)
        label = f"{named}{share}"
        made = replace(base, kind="width", method=method, method_label=named)
        made = replace(made, cut_in=allowed_blocks(cut))
    else:
        method = cut.criterion or ""
        protected = _protected(cut)
        gone = _gone(cut, blocks)
        named = criterion_label(method, protected) if method else "by hand"
        label = (named if method else f"without {', '.join(map(str, gone))}") + share
        made = replace(base, kind="depth", method=method, method_label=named, dropped=gone)
        made = replace(made, cut_in=allowed_blocks(cut))
    return made if record.name != record.id else replace(made, label=label)


def _protected(cut: Pruning) -> bool:
    """Whether first and last blocks were protected: as the plan says, else as by default."""
    if plan := cut.planned:
        return bool(plan.protect_first or plan.protect_last)
    blocks = cut.blocks_before or 0
    first, last = default_protection(blocks)
    return all(first <= b < blocks - last for b in cut.dropped or (0,))


def cut_of(folder: Path) -> WidthPruning:
    """Return what a cut of either kind recorded in ``folder``; all defaults without a record."""
    return WidthPruning.read(folder) or WidthPruning()


def allowed_blocks(cut: WidthPruning) -> tuple[int, ...]:
    """Return the blocks that a pruning.json's method might cut, by their dense numbers.

    Those of --layers for width, all but the plan's protected ones for depth; empty where blocks
    were named by hand.
    """
    plan = cut.planned
    if cut.layers is not None:
        own = cut.layers
    elif plan and plan.blocks:
        own = unprotected(plan.blocks, plan.protected)
    else:
        return ()
    source = sorted({*cut.original_blocks, *(cut.dropped_original or cut.dropped)})
    return tuple(source[b] if b < len(source) else b for b in own)


def _gone(cut: Pruning, blocks: int | None) -> tuple[int, ...]:
    """Return the blocks of the dense model, which has ``blocks``, that went; the last cut's last.

    Within the last cut they keep their removal order.
    """
    last = cut.dropped_original or cut.dropped
    left = {*cut.original_blocks, *last}
    earlier = [b for b in range(blocks or 0) if b not in left] if cut.lineage else []
    return (*earlier, *last)


def _distinct(found: list[Variant]) -> list[Variant]:
    """Give every variant a label of its own: the same ones are numbered from the second on."""
    seen: dict[str, int] = {}
    result = []
    for variant in found:
        count = seen[variant.label] = seen.get(variant.label, 0) + 1
        result.append(
            replace(variant, label=f"{variant.label} ({count})") if count > 1 else variant
        )
    return result
