"""By which method the set of a variant was chosen, and a better set of its size if one is known.

Sets are those of finished searches: of blocks or of parts of blocks, healed or not. What a search
measured is of its own rows, so it never takes the place of a variant's figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.checkpoint.drop import Removal
from core.compare.candidates import Candidate
from core.compare.verdict import Contender, Verdict
from core.criteria import LABELS
from core.prune.results import Pruning, perplexity
from core.prune.set_results import Search, SetRow
from core.runs.workspace import RunRecord
from core.study import info_of
from core.words import rounded

SAME_SIZE = 0.001
"""Ratios this close are the same size."""


@dataclass(frozen=True)
class Known:
    """A set that a search found, of the size of a variant."""

    record: RunRecord
    search: Search
    row: SetRow
    shown: SetRow | None = None
    """The variant's own set in the same search, healed in the same way."""

    @property
    def sentence(self) -> str:
        """What it costs, next to the variant's set if the search has both."""
        row = self.row
        healed = f", healed by {row.heal}" if row.heal != "none" else ""
        by = f"({_label(row.method)}{healed}): without {_gone(row.removal)}"
        own, text = _figures(row), _measured_on(self.search, row)
        if self.shown:
            return (
                f"A search found a set of this size with a lower KL {by}. It has {own}, the set "
                f"shown here {_figures(self.shown)}{text}. Make it, and evaluate it as the others "
                "were."
            )
        return (
            f"A search found another set of this size {by}. It has {own}{text}. Make it and "
            "evaluate it to see which is better: the set shown here was measured on other text."
        )


def _gone(removal: Removal) -> str:
    if removal.partial:
        return removal.text
    blocks = ", ".join(map(str, sorted(removal.drop)))
    return f"block{'s' * (len(removal.drop) > 1)} {blocks}"


def _label(criterion: str) -> str:
    return LABELS.get(criterion.replace("-", "_").removesuffix("+"), criterion)


def _reason(criterion: str) -> str:
    """Return what chose a set, after a colon."""
    name = criterion.replace("_", "-").removesuffix("+").lower()
    return "the blocks without which perplexity rises least" if name == "ppl" else _label(criterion)


def _is_heldout(row: SetRow) -> bool:
    """Whether text that chose nothing was measured; otherwise figures are of the calibration."""
    return row.heldout_kl is not None


def _figures(row: SetRow) -> str:
    """Return what a search measured of a set."""
    heldout = _is_heldout(row)
    kl, nll = (row.heldout_kl, row.heldout_nll) if heldout else (row.kl, row.nll)
    said = [f"KL {kl:.4g}"] if kl is not None else []
    ppl = perplexity(nll)
    said += [f"perplexity {rounded(ppl)}"] if ppl is not None else []
    return " and ".join(said) or "unknown figures"


def _measured_on(search: Search, row: SetRow) -> str:
    """Return the dense model's perplexity and the text, to go behind figures of ``row``."""
    heldout = _is_heldout(row)
    dense = perplexity(search.dense_heldout_nll if heldout else search.dense_nll)
    beside = f" (dense: {rounded(dense)})" if dense is not None else ""
    text = "held-out text that chose nothing" if heldout else "the rows that chose it"
    return f"{beside}, measured on {text}"


def searches(runs: Sequence[RunRecord], found: Verdict) -> list[tuple[RunRecord, Search]]:
    """Return the finished searches of exactly the dense model's weights, among ``runs``."""
    info = info_of(found.study.dense)
    done = [r for r in runs if r.command == "search" and r.state == "done"]
    read = [(r, Search.read(r.path)) for r in done]
    return [(r, s) for r, s in read if s and info and s.checkpoint_key == info.key]


def how(found: Verdict, one: Contender, runs: Sequence[RunRecord]) -> str:
    """Return how the set of a depth-pruned variant or plan was chosen; empty for other kinds."""
    own = one.candidate
    if own.kind != "depth":
        return ""
    said = "How the set was chosen: " + (_reason(own.method) if own.method else "by hand")
    read = _search_of(found, own, runs) if own.method else None
    if read:
        search = read[1]
        goal = "least KL from the dense model" if search.objective == "kl" else "least loss"
        text = Path(search.calibration or "").name
        said += (
            f", for the {goal} on {text} ({search.samples} x {search.length} tokens); "
            f"{search.sets_measured:,} sets were measured"
        )
    if own.healed:
        said += f". Its seams were healed by {own.healed}"
    if own.is_plan:
        said += ". It is a plan: a checkpoint of it has not been made yet"
    if own.is_plan and read:
        said += ", and its perplexity is of the rows that chose it"
        row = _row_of(read, own)
        if row and _is_heldout(row):
            said += f". It has {_figures(row)}{_measured_on(read[1], row)}"
    return f"{said}."


def _row_of(read: tuple[RunRecord, Search], own: Candidate) -> SetRow | None:
    rows = SetRow.read(read[0].path)
    return next((r for r in rows if _key_of(r) == _key(own) and r.method == own.method), None)


def _search_of(
    found: Verdict, own: Candidate, runs: Sequence[RunRecord]
) -> tuple[RunRecord, Search] | None:
    """Return the search that chose a candidate's set, by what its plan says."""
    known = searches(runs, found)
    if own.is_plan:
        plans = (q for q in found.study.quality if not q.variant and q.criterion == own.method)
        ids = {plan.run for plan in plans if plan.drop == own.dropped}
        return next((pair for pair in known if pair[0].id in ids), None)
    made = found.study.find(own.id)
    while made and (made.retrained or made.quantized):  # the cut is that of what it was made from
        made = found.study.find(made.parent)
    cut = Pruning.read(made.record.path) if made and made.record else None
    scores = str((cut.plan or {}).get("scores") or "") if cut else ""
    if not scores:
        return None
    name = Path(scores).name
    return next((pair for pair in known if scores == pair[0].id or name == pair[0].path.name), None)


def better(found: Verdict, one: Contender, runs: Sequence[RunRecord]) -> Known | None:
    """Return the set with the least KL of all searches of the variant's size, if it is another one.

    Calibration rows choose it, as in a search. None if it is the variant's own set, if held-out
    rows of that search prefer the variant's, if the study measured it as it did the variant, or if
    the variant was not made by removing blocks.
    """
    if one.candidate.kind != "depth":
        return None
    measured = {_key(c.candidate) for c in found.found if c.candidate.kind == "depth" and c.ppl}
    mine = _key(one.candidate)
    pairs = [
        (record, search, row)
        for record, search in searches(runs, found)
        for row in SetRow.read(record.path)
        if row.units and row.ratio is not None and row.kl is not None
        and abs(row.ratio - one.ratio) < SAME_SIZE
    ]  # fmt: skip
    best = min(pairs, key=lambda pair: pair[2].kl or 0.0, default=None)
    if best is None or _key_of(best[2]) in {mine, *measured}:
        return None
    record, search, row = best
    own = next((r for r in SetRow.read(record.path) if _key_of(r) == mine), None)
    if own and (row.heldout_kl or 0.0) > (own.heldout_kl or 0.0):
        return None
    return Known(record, search, row, own)


def _key(own: Candidate) -> tuple[Removal, str]:
    return own.removal.ordered, own.healed


def _key_of(row: SetRow) -> tuple[Removal, str]:
    return row.removal.ordered, "" if row.heal == "none" else row.heal
