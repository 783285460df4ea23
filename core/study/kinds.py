"""The parts of a study: variants and what was measured about them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core import outside
from core.benchmark.results import CompiledPoint, Point, Summary, TimedRun
from core.checkpoint import headers, locate
from core.checkpoint.drop import Removal
from core.criteria import LABELS
from core.errors import DepthcutError
from core.retrain.shares import Share
from core.retrain.spec import LABELS as RETRAINED
from core.runs import workspace
from core.runs.workspace import RunRecord
from core.width.methods import METHODS

SHORT = {"ppl": "PPL", "sleb": "SLEB", "angular": "Angular"}
PLUS = ("ppl", "taylor", "magnitude")
"""Criteria that get a ``+`` (as published) if the first and last blocks are protected."""


def criterion_label(criterion: str, protected: bool = False) -> str:
    """Return the label of a criterion: ``taylor`` is Taylor+ with protection, otherwise Taylor."""
    name = criterion.replace("_", "-").removesuffix("+")
    known = LABELS.get(name.replace("-", "_"), name)
    label = SHORT.get(name) or known[:1].upper() + known[1:]
    return label + ("+" if name in PLUS and (protected or criterion.endswith("+")) else "")


def width_label(method: str, variant: str = "") -> str:
    """Return the label of a width method; controls are marked as width.

    ``variant``: what differs from the method's usual way, e.g. ``vector, MLP only``.
    """
    known = METHODS.get(method)
    label = known.label if known else method.capitalize()
    label = label if known and known.samples else f"{label} width"
    return f"{label}, {variant}" if variant else label


@dataclass(frozen=True)
class Cut:
    """A run's own cut, in terms of the checkpoint that it was made from."""

    dropped: tuple[int, ...] = ()
    """Blocks that it dropped, numbered as in its source."""
    attention: tuple[int, ...] = ()
    """Kept blocks that lost their attention, numbered as in its source."""
    mlp: tuple[int, ...] = ()
    """Kept blocks that lost their MLP."""
    blocks: int | None = None
    """Blocks that are left."""
    parameters: int | None = None
    """Parameters that are left."""
    ratio: float | None = None
    """Share of its source's parameters that it removed."""

    @property
    def removal(self) -> Removal:
        """All that it removed, numbered as in its source."""
        return Removal(self.dropped, self.attention, self.mlp)


@dataclass(frozen=True)
class Variant:
    """One checkpoint of a study, in one shape from the run's record to a chart."""

    id: str
    """The run's id; for a dense checkpoint the name it was given."""
    label: str
    """Label in charts and tables; different for every variant of a study."""
    kind: str
    """dense, depth, width, or other: measured with the study but not made from its dense model."""
    method: str = ""
    """Criterion or width method as on the command line; empty if the blocks were given by hand."""
    method_label: str = ""
    """PPL+, Taylor+, LLM-Pruner, by hand, dense, ..."""
    healed: str = ""
    """refit, linear, scale, or empty."""
    retrained: str = ""
    """lora, continued, full, or empty."""
    quantized: str = ""
    """int8, int4, or empty."""
    dropped: tuple[int, ...] = ()
    """Blocks of the dense model that were removed, in order of removal."""
    without_attention: tuple[int, ...] = ()
    """Kept blocks that have no attention, by the dense model's numbers."""
    without_mlp: tuple[int, ...] = ()
    """Kept blocks that have no MLP."""
    cut_in: tuple[int, ...] = ()
    """Blocks of the dense model that the method was allowed to cut; empty if unknown."""
    blocks: int | None = None
    """Blocks that it has; None if that is not known."""
    parameters: int | None = None
    ratio: float | None = None
    """Share of the dense checkpoint's parameters that was removed."""
    parent: str = ""
    """Id of the variant it was made from."""
    folder: Path | None = None
    """Folder of its checkpoint; None if there is none (an unmerged adapter, or it was deleted)."""
    record: RunRecord | None = None
    """The run that made it; None for a dense checkpoint and for one that is not of a run."""
    cut: Cut | None = field(default=None, repr=False)
    """None for a dense checkpoint."""

    @functools.cached_property
    def disk_bytes(self) -> int:
        """Disk use of the run, or of the dense checkpoint's folder; counted once, when used."""
        folder = self.record.path if self.record else self.folder
        return workspace.disk_bytes(folder) if folder else 0

    @functools.cached_property
    def info(self) -> headers.CheckpointInfo | None:
        """Shapes and sizes, read when used; None if its checkpoint is missing or incomplete."""
        try:
            return locate.at(self.folder).info if self.folder else None
        except (DepthcutError, OSError):
            return None

    @property
    def removal(self) -> Removal:
        """Blocks and parts of blocks of the dense model that it lacks."""
        return Removal(self.dropped, self.without_attention, self.without_mlp)

    @property
    def series(self) -> str:
        """Series that it belongs to in a chart: its method, how retrained and quantized."""
        if self.kind == "other":
            return self.label
        tuned = RETRAINED.get(self.retrained, self.retrained)
        method = f"{self.method_label}, healed" if self.healed else self.method_label
        name = f"{method} + {tuned}" if tuned else method
        return f"{name} {self.quantized}" if self.quantized else name

    @property
    def is_made(self) -> bool:
        """Whether it was made from the dense model: pruned or quantized."""
        return self.kind in ("depth", "width") or bool(self.quantized)


@dataclass(frozen=True)
class Protocol:
    """How a perplexity was measured; only perplexities of equal protocols are comparable."""

    source: str
    window: int | None
    bos: str
    """once, window, or rows: crops of calibration rows (importance, curve), or held-out rows."""
    detail: str = ""
    """What else must be equal: number of samples and seed of the rows; the part of the text."""

    @property
    def label(self) -> str:
        """The protocol in words."""
        name = Path(self.source).name or self.source
        if self.bos == "held-out":
            return f"held-out rows of {name}, {self.detail}"
        if self.bos == "rows":
            return f"{name}, {self.detail} of {self.window} tokens"
        how = {"window": "in every window", "extra": "before every window"}.get(self.bos, "once")
        part = f", {self.detail}" if self.detail else ""
        return f"{name}, windows of {self.window}, BOS {how}{part}"


@dataclass(frozen=True)
class Quality:
    """One measured perplexity: of a variant, or of a plan (``variant`` empty, ``drop`` set)."""

    protocol: Protocol
    ppl: float
    run: str
    variant: str = ""
    criterion: str = ""
    protected: bool = False
    drop: tuple[int, ...] = ()
    cut_in: tuple[int, ...] = ()
    """Blocks that the plan's criterion was allowed to drop: those that were not protected."""
    parameters: int | None = None
    ratio: float | None = None
    tokens: int | None = None
    device: str = ""
    dtype: str = ""
    started: float = 0.0


@dataclass(frozen=True)
class Task:
    """One score of an evaluate run, and the variant that it is of."""

    variant: str
    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int | None
    run: str
    started: float = 0.0
    prompting: str = ""
    """How the task was asked, in words; empty for the task's own way. Only equal ones compare."""
    is_written: bool = False
    """Whether the model writes the answer itself, instead of choosing one of several."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark run: its summary, and its points with the id of each point's variant."""

    record: RunRecord
    summary: Summary
    points: tuple[Point, ...]
    ids: dict[str, str]
    """Ids of the measured variants by their names in this run."""
    missing: tuple[str, ...] = ()
    """Names of measured variants whose checkpoint has since been deleted."""
    compiled: tuple[CompiledPoint, ...] = ()
    """The second series, with a static cache and compiled steps, if one was measured."""

    def variant_of(self, point: Point | TimedRun) -> str:
        """Return the id of a row's variant; empty if its checkpoint is gone."""
        return self.ids.get(point.variant, "")

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.id


@dataclass(frozen=True)
class Study:
    """A dense checkpoint, everything made from it, and what was measured about them."""

    variants: tuple[Variant, ...]
    """The dense one first, then by age; last, others that were measured with them."""
    quality: tuple[Quality, ...] = ()
    tasks: tuple[Task, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    """Newest first."""
    runs: tuple[RunRecord, ...] = field(default=(), repr=False)
    """All runs that belong to the study, newest first."""
    shares: Mapping[str, tuple[Share, ...]] = field(default_factory=dict)
    """What each retraining brought back on the texts that it measured, by the variant's id."""

    @property
    def dense(self) -> Variant:
        """The checkpoint that everything was made from."""
        return self.variants[0]

    def find(self, name: str) -> Variant | None:
        """Return the variant with this id, otherwise the one with this label."""
        by_id = {v.id: v for v in self.variants}
        return by_id.get(name) or next((v for v in self.variants if v.label == name), None)

    def at(self, folder: str | Path) -> Variant | None:
        """Return the variant whose checkpoint or run a path or a spec's name means."""
        return self.finder()(str(folder))

    def finder(self) -> Finder:
        """Return what finds the variant that a name means, with no look-ups kept yet."""
        return copy.copy(self._finder)

    @functools.cached_property
    def _finder(self) -> Finder:
        return Finder(self.variants)

    @functools.cached_property
    def protocols(self) -> tuple[Protocol, ...]:
        """The ways perplexity was measured, the one with most checkpoints first."""
        counts: dict[Protocol, tuple[int, int]] = {}
        for row in self.quality:
            made, planned = counts.get(row.protocol, (0, 0))
            counts[row.protocol] = (made + bool(row.variant), planned + (not row.variant))
        return tuple(sorted(counts, key=lambda p: counts[p], reverse=True))

    def perplexity(self, variant: str, protocol: Protocol) -> Quality | None:
        """Return the newest perplexity of a variant by a protocol; None if there is none."""
        return self._newest.get((variant, protocol))

    @functools.cached_property
    def _newest(self) -> dict[tuple[str, Protocol], Quality]:
        """The newest perplexity by variant and protocol."""
        found: dict[tuple[str, Protocol], Quality] = {}
        for row in self.quality:
            key = (row.variant, row.protocol)
            if key not in found or found[key].started < row.started:
                found[key] = row
        return found

    def plans(self, protocol: Protocol) -> tuple[Quality, ...]:
        """Return the perplexities of plans by a protocol: criterion, count, blocks."""
        return tuple(q for q in self.quality if not q.variant and q.protocol == protocol)


class Finder:
    """Finds the variant that a spec or a summary names; look-ups are kept."""

    def __init__(self, known: Sequence[Variant]) -> None:
        """Index the variants by id, checkpoint folder and run folder."""
        self._by_name = {v.id: v for v in known}
        self._by_run = {v.record.path.resolve(): v for v in known if v.record}
        self._by_folder = {v.folder.resolve(): v for v in reversed(known) if v.folder}
        self._found: dict[tuple[str, str], Variant | None] = {}

    def __copy__(self) -> Finder:
        """Return one with the same index; what a name means on the disk is found again."""
        twin = Finder(())
        twin._by_name, twin._by_run = self._by_name, self._by_run
        twin._by_folder = self._by_folder
        return twin

    def __call__(self, name: str, cwd: str = "") -> Variant | None:
        """Return the variant whose checkpoint or run contains ``name``; None if there is none."""
        if name in self._by_name:
            return self._by_name[name]
        if (name, cwd) not in self._found:
            self._found[name, cwd] = self._find(name, cwd)
        return self._found[name, cwd]

    def _find(self, name: str, cwd: str) -> Variant | None:
        for path in meanings(name, cwd):
            if path in self._by_folder:
                return self._by_folder[path]
            for candidate in (path, *path.parents):
                if candidate in self._by_run:
                    return self._by_run[candidate]
        return None


def meanings(name: str, cwd: str = "") -> list[Path]:
    """Return the folders that a name may mean, relative to here, the workspace or its cwd."""
    local = locate.local_folder(name)
    starts = [local, outside.path_of(name), workspace.default_root() / name]
    starts += [Path(cwd) / name] if cwd else []
    return [start.resolve() for start in starts if start]


def info_of(variant: Variant) -> headers.CheckpointInfo | None:
    """Return shapes and sizes of a variant; None if its checkpoint is missing or incomplete."""
    return variant.info
