"""What the Prune page shows, computed from a checkpoint, its scores and its finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core import criteria, words
from core.checkpoint.drop import Removal, check_removal
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.prune import plan as planning
from core.prune import scores as block_scores
from core.prune.outlook import CurvePoint, Line, Outlook, Quality, curve_points, quality, same_text
from core.prune.results import Healing, Pruning
from core.prune.score_results import Curve, Importance
from core.runs.workspace import RunRecord, Workspace
from core.words import rounded, size


def summary_of(record: RunRecord) -> Importance:
    """Return what an importance run measured; all defaults if it has left no summary."""
    return Importance.read(record.path) or Importance()


def scored_runs(where: Workspace, info: CheckpointInfo) -> list[RunRecord]:
    """Return the finished importance runs of exactly these weights, newest first."""
    done = [r for r in where.runs("importance") if r.state == "done"]
    return [r for r in done if info.key and summary_of(r).checkpoint_key == info.key]


def label_of(record: RunRecord, name: str) -> str:
    """Label of an importance run called ``name`` in a list, with what it was calibrated on."""
    found = summary_of(record)
    return (
        f"{name}: {found.samples} x {found.length} tokens, "
        f"seed {found.seed}, {found.device} {found.dtype}"
    )


def called(criterion: str) -> str:
    """Return what lists and headings call a criterion."""
    return criteria.SHORT.get(criterion, criterion)


def measured_on(found: Importance) -> str:
    """Return the line under every chart: text, samples, length, seed, device, precision."""
    if found.samples is None:
        return ""
    return (
        f"Measured: {Path(found.calibration or '').name}, {found.samples} x {found.length} "
        f"tokens, seed {found.seed}, {found.device}, {found.dtype}."
        + "".join(f" {note}" for note in found.text.notes)
    )


@dataclass(frozen=True)
class Known:
    """What is known about removing blocks from one checkpoint."""

    info: CheckpointInfo
    scores: block_scores.BlockScores | None = None
    run: str = ""
    dense_ppl: float | None = None
    points: tuple[CurvePoint, ...] = ()
    note: str = ""
    """What the scores were measured on, for the line under a chart."""

    @property
    def without(self) -> tuple[float | None, ...]:
        """Perplexity without each single block; empty if it was not measured."""
        return tuple(self.scores.columns.get("ppl", ())) if self.scores else ()

    @property
    def has_ppl(self) -> bool:
        """Whether every block's perplexity was measured, so that bars can be drawn."""
        return bool(self.without) and all(v is not None for v in self.without)

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria that can rank the blocks: those with scores, then the controls."""
        scored = self.scores.available if self.scores else ()
        return (*(c for c in scored if c in criteria.NAMES), *criteria.CONTROLS)

    def quality(self, removal: Removal | Sequence[int]) -> Quality | None:
        """Return what is known of the perplexity without ``removal``."""
        sublayers = self.scores.sublayers if self.scores else None
        return quality(removal, self.dense_ppl, self.without, self.points, self.run, sublayers)

    def chosen_by(self, criterion: str, removal: Removal, first: int, last: int) -> bool:
        """Whether ``removal`` is exactly what ``criterion`` takes first under this protection."""
        try:
            chosen = self.choose(criterion, self.count(criterion, removal), first, last)
        except DepthcutError:
            return False
        return bool(removal) and chosen.ordered == removal.ordered

    def ranks_parts(self, criterion: str) -> bool:
        """Whether ``criterion`` ranks parts of blocks, not blocks."""
        return criterion == criteria.SUBLAYERS

    def count(self, criterion: str, removal: Removal) -> int:
        """Return how much is removed in what ``criterion`` ranks: blocks, or parts of blocks."""
        return removal.units if self.ranks_parts(criterion) else len(removal.drop)

    def problem(self, criterion: str, first: int, last: int) -> str:
        """Return why ``criterion`` cannot choose even one block; empty if it can."""
        try:
            self.choose(criterion, 1, first, last)
        except DepthcutError as error:
            return str(error)
        return ""

    def choose(self, criterion: str, count: int, first: int, last: int) -> Removal:
        """Return the first ``count`` blocks, or parts, that ``criterion`` removes; none for 0."""
        if count < 1:
            return Removal()
        chosen = planning.choose(
            self.scores,
            criterion,
            count=count,
            info=self.info,
            protect_first=first,
            protect_last=last,
        )
        return chosen.removal

    def ratios(self, criterion: str, first: int, last: int) -> list[float]:
        """Return the share of parameters removed with the first 0, 1, 2, ... blocks or parts."""
        most = max(0, min(self.info.blocks - first - last, self.info.blocks - 1))
        if self.ranks_parts(criterion):
            most = max(0, min(2 * (self.info.blocks - first - last), 2 * self.info.blocks - 1))
        found = [0.0]
        for count in range(1, most + 1):
            try:
                drop = self.choose(criterion, count, first, last)
            except DepthcutError:
                break
            left = planning.parameters_after(self.info, drop)
            found.append(1 - left / self.info.parameters)
        return found

    def lines(self, criterion: str, first: int, last: int) -> list[Line]:
        """Return the criterion's curves: the points measured by curve runs, and the estimates."""
        measured: list[tuple[float, float, str]] = []
        estimated: list[tuple[float, float, str]] = []
        for count in range(len(self.ratios(criterion, first, last))):
            drop = self.choose(criterion, count, first, last)
            found = self.quality(drop)
            if found:
                target = measured if found.kind == "measured" else estimated
                target.append((drop.units / 2, found.ppl, labelled(drop)))
        lines = [(measured, "measured"), (estimated, "estimated")]
        return [Line(criterion, kind, points) for points, kind in lines if points]


def known(where: Workspace, info: CheckpointInfo, record: RunRecord | None) -> Known:
    """Collect scores and measured curves; raises `DataError` if the scores cannot be read."""
    if record is None:
        return Known(info)
    summary = summary_of(record)
    curves = [
        r
        for r in where.runs("curve")
        if r.state == "done" and same_text(Curve.read(r.path) or Curve(), summary)
    ]
    return Known(
        info=info,
        scores=block_scores.load(record.path),
        run=record.id,
        dense_ppl=summary.dense_ppl,
        note=measured_on(summary),
        points=tuple(point for r in curves for point in curve_points(r.path)),
    )


def healings(where: Workspace, info: CheckpointInfo) -> dict[Removal, Healing]:
    """Return what healing gained for each cut of these weights, newest run first.

    Cuts are as `cut_of` has them. Of several runs with the same cut the newest counts.
    """
    found: dict[Removal, Healing] = {}
    for record in where.runs("prune"):
        cut = Pruning.read(record.path) if record.state == "done" else None
        if cut and cut.healing and info.key and cut.source_key == info.key:
            found.setdefault(cut_of(cut.removal), cut.healing)
    return found


def cut_of(removal: Removal) -> Removal:
    """Return what is cut, without the order in which it was chosen and what ranked the neurons."""
    return replace(removal.ordered, order="")


def healing_rows(
    plans: Mapping[str, Removal], found: Mapping[Removal, Healing]
) -> list[dict[str, Any]]:
    """Return rows for the comparison table: plain and healed, on the text that healed.

    Empty if no plan was cut and healed yet.
    """
    healed = {name: found.get(cut_of(removal)) for name, removal in plans.items() if removal}
    known = {name: healing for name, healing in healed.items() if healing}
    if not known:
        return []
    rows = {
        "healed": {n: h.method if h.method != "none" else "no gain" for n, h in known.items()},
        "KL: plain, healed": {n: _both(h.kl_before, h.kl_after) for n, h in known.items()},
        "perplexity: plain, healed": {
            n: _both(h.perplexity("before"), h.perplexity("after")) for n, h in known.items()
        },
    }
    dense = {
        "perplexity: plain, healed": next(
            (rounded(p) for h in known.values() if (p := h.perplexity("dense"))), ""
        ),
        "KL: plain, healed": "0",
    }
    return [
        {"": fact, "dense": dense.get(fact, "-")}
        | {f"plan {name}": row.get(name, "not healed yet") for name in plans}
        for fact, row in rows.items()
    ]


def _both(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "unknown"
    return f"{rounded(before)}, {rounded(after)} (measured)"


def labelled(removal: Removal) -> str:
    """Return what is removed as a label: block numbers in removal order, or words with parts."""
    return removal.text if removal.partial else ", ".join(map(str, removal.drop))


def shortly(removal: Removal) -> str:
    """Return the block numbers, or with parts how many of each, as a label of bounded length."""
    if not removal.partial:
        return labelled(removal)
    counts = {
        "block": len(removal.drop),
        "part": len(removal.parts),
        "narrower MLP": len(removal.width),
    }
    return ", ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in counts.items() if n)


def problem_of(removal: Removal, info: CheckpointInfo) -> str:
    """Return the command's own message if ``removal`` cannot be removed; otherwise empty."""
    try:
        check_removal(removal, info.block_shapes)
    except DepthcutError as error:
        return str(error)
    return ""


def rows(
    dense: Outlook, plans: dict[str, tuple[Outlook, Quality | None, Removal]], ppl: Any
) -> list[dict[str, Any]]:
    """Return the comparison table: one row per fact, one column for dense and each plan."""
    columns = {"dense": (dense, ppl, Removal()), **{f"plan {n}": v for n, v in plans.items()}}
    facts: dict[str, Any] = {
        "blocks dropped": lambda o, q, d: words.block_ranges(d.drop) or "none",
        "without attention": lambda o, q, d: words.block_ranges(d.attention) or "none",
        "without MLP": lambda o, q, d: words.block_ranges(d.mlp) or "none",
        "narrower MLP": lambda o, q, d: words.block_ranges(d.neurons) or "none",
        "blocks left": lambda o, q, d: f"{o.blocks}",
        "parameters": lambda o, q, d: f"{o.parameters:,}",
        "parameters removed": lambda o, q, d: f"{o.ratio:.1%}",
        "perplexity": lambda o, q, d: "unknown" if q is None else f"{rounded(q.ppl)} ({q.kind})",
        "weights": lambda o, q, d: size(o.weight_bytes),
        "key/value cache": lambda o, q, d: size(o.kv_bytes),
        "weights + cache": lambda o, q, d: size(o.total_bytes),
    }
    for fact, part in (
        ("without attention", "attention"),
        ("without MLP", "mlp"),
        ("narrower MLP", "width"),
    ):
        if not any(getattr(removal, part) for _, _, removal in columns.values()):
            del facts[fact]
    return [
        {"": fact} | {name: show(*value) for name, value in columns.items()}
        for fact, show in facts.items()
    ]
