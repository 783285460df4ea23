"""One checkpoint of a study, from its folder or from the record of the run that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from core.checkpoint import locate
from core.errors import DepthcutError
from core.prune.plan import default_protection, unprotected
from core.prune.results import Pruning
from core.quantize.results import QuantizationRecord
from core.retrain.spec import LABELS as RETRAINED
from core.runs import workspace
from core.runs.workspace import RunRecord
from core.study.kinds import Cut, Variant, criterion_label, width_label
from core.width.results import WidthPruning
from core.words import block_ranges


def dense(name: str) -> Variant:
    """Return a dense checkpoint; ``name`` is its name in the specs of runs."""
    folder = locate.local_folder(name)
    label = name if folder is None or name == "demo" else folder.name
    config = workspace.read_json(folder / "config.json") if folder else None
    blocks = (config or {}).get("num_hidden_layers")
    try:
        total = locate.at(folder).info.parameters if folder else None
    except (DepthcutError, OSError):
        total = None
    return Variant(
        name,
        label,
        "dense",
        method_label="dense",
        blocks=blocks if isinstance(blocks, int) else None,
        parameters=total,
        ratio=0.0,
        folder=folder,
    )


def _asked(record: RunRecord) -> tuple[int, ...]:
    """Return the blocks that a run was asked to drop; empty if its record does not list them."""
    drop = record.spec.get("drop")
    return tuple(b for b in drop if type(b) is int) if isinstance(drop, list) else ()


_KEPT = (
    "method",
    "method_label",
    "dropped",
    "without_attention",
    "without_mlp",
    "cut_in",
    "healed",
)
"""What a variant shares with the one that it was retrained or quantized from."""


def made(record: RunRecord, parent: Variant, root: Variant) -> Variant:
    """Return the variant that a run made from ``parent``; ``root`` is the dense checkpoint."""
    quantized = QuantizationRecord.read(record.path) if record.command == "quantize" else None
    # a quantized checkpoint keeps a copy of its source's pruning.json, and cuts nothing itself
    written = WidthPruning() if record.command == "quantize" else cut_of(record.path)
    cut = Cut(
        written.dropped or (() if written.removal.partial else _asked(record)),
        written.attention,
        written.mlp,
        written.blocks_after,
        written.parameters_after,
        written.ratio,
    )
    left, total = cut.parameters or parent.parameters, root.parameters
    ratio = 1 - left / total if left and total else cut.ratio
    base = Variant(
        record.id,
        record.name,
        parent.kind,
        blocks=cut.blocks or parent.blocks,
        parameters=left,
        ratio=ratio,
        parent=parent.id,
        folder=_folder(record),
        record=record,
        cut=cut,
    )
    share = f" {ratio:.0%}" if ratio else ""
    kept = {name: getattr(parent, name) for name in _KEPT}
    if record.command == "quantize":
        bits = quantized.bits if quantized else record.spec.get("bits")
        named = f"int{bits}"
        found = replace(base, retrained=parent.retrained, quantized=named, **kept)
        label = f"{parent.label} {named}"
    elif record.command == "retrain":
        method = str(record.spec.get("method") or "")
        label = f"{parent.label} + {RETRAINED.get(method, method)}"
        found = replace(base, retrained=method, **kept)
    elif record.command == "width":
        method = str(written.method or record.spec.get("method") or "width")
        named = width_label(method, written.variant)
        label = width_label(method) + share + (f", {written.variant}" if written.variant else "")
        label += ", healed" if written.healed else ""
        found = replace(base, kind="width", method=method, method_label=named)
        found = replace(found, healed=written.healed)
        found = replace(found, cut_in=allowed_blocks(written))
    else:
        method = written.criterion or ""
        protected = _protected(written)
        gone = _gone(written, root.blocks)
        named = criterion_label(method, protected) if method else "by hand"
        found = replace(base, kind="depth", method=method, method_label=named, dropped=gone)
        lacking = {f: getattr(written, f) for f in ("without_attention", "without_mlp")}
        found = replace(found, **lacking)
        by_hand = found.removal.text if found.removal.partial else block_ranges(gone)
        label = f"{named}{share}" if method else f"without {by_hand}"
        label += f" ({share.strip()})" if share and not method else ""
        label += ", healed" if written.healed else ""
        found = replace(found, healed=written.healed)
        found = replace(found, cut_in=allowed_blocks(written))
    return replace(found, label=record.given or label)


def cut_of(folder: Path) -> WidthPruning:
    """Return what a cut of either kind recorded in ``folder``; all defaults without a record."""
    return WidthPruning.read(folder) or WidthPruning()


def _folder(record: RunRecord) -> Path | None:
    """Return where a run's checkpoint is; None if it left none."""
    for folder in (record.path / "merged", record.path):
        if (folder / "config.json").is_file():
            return folder
    return None


def _protected(cut: Pruning) -> bool:
    """Whether first and last blocks were protected: by the plan, otherwise by default."""
    if plan := cut.planned:
        return bool(plan.protect_first or plan.protect_last)
    blocks = cut.blocks_before or 0
    first, last = default_protection(blocks)
    touched = (*cut.dropped, *cut.attention, *cut.mlp)
    return all(first <= b < blocks - last for b in touched or (0,))


def allowed_blocks(cut: WidthPruning) -> tuple[int, ...]:
    """Return the blocks that the method of a pruning.json was allowed to cut, in dense numbering.

    Those of --layers for width, all but the plan's protected ones for depth; empty if the blocks
    were given by hand.
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
    """Return which of the dense model's ``blocks`` blocks were removed, the last cut's at the end.

    Blocks of the last cut keep their order of removal.
    """
    last = cut.dropped_original or cut.dropped
    left = {*cut.original_blocks, *last}
    earlier = [b for b in range(blocks or 0) if b not in left] if cut.lineage else []
    return (*earlier, *last)
