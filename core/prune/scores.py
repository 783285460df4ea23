"""Per-block scores: from an importance run's folder, or from any CSV file.

Lower scores mean "remove first" for every criterion. Angular distance scores contiguous ranges
(Gromov et al.): ``angular[(start, length)]``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core import outside
from core.checkpoint.drop import PARTS, Removal
from core.criteria import COLUMNS, SUBLAYERS
from core.criteria import NAMES as CRITERIA
from core.errors import DataError, OptionError
from core.prune.score_results import AngularRow, BlockRow, GreedyRow, Importance, SublayerRow
from core.prune.set_results import BEST, Search, SetRow, by_count
from core.runs import workspace

GENERIC = "score"
"""The column of a CSV that does not name its criterion."""
_ID_COLUMNS = ("block", "block_name", "removed_block")
_COLUMNS = {**COLUMNS, "ppl_bookcorpus": "ppl", "block_score": GENERIC, "score": GENERIC}
_PREFIX = "model.layers."


def canonical(criterion: str) -> str:
    """Return a criterion's full name.

    A plus as in ``taylor+`` is ignored (it stands for protection, which plans apply by default),
    and underscores become hyphens. Raises `OptionError` for an unknown name.
    """
    name = criterion.strip().lower().replace("_", "-").removesuffix("+").removesuffix("-plus")
    name = {"reverse": "last", "bi": "block-influence"}.get(name, name)
    if name not in CRITERIA:
        raise OptionError(
            f"Unknown criterion '{criterion}'.", f"Choose from: {', '.join(CRITERIA)}."
        )
    return name


@dataclass(frozen=True)
class BlockScores:
    """Scores of every block of one model."""

    source: str
    """The folder or file they were read from."""
    blocks: int
    columns: Mapping[str, tuple[float | None, ...]]
    """Criterion -> one score per block, None for an empty cell."""
    angular: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """(start, length) -> distance between the input of block start and of start + length."""
    greedy: tuple[int, ...] = ()
    """Blocks in the order in which greedy search removed them; it may have stopped early."""
    checkpoint: str | None = None
    """The checkpoint that was scored, if the run records it."""
    sets: tuple[SetRow, ...] = ()
    """Sets that search found; all of them keep the blocks in ``protected``."""
    part_sets: bool = False
    """Whether these sets are of parts of blocks."""
    protected: tuple[int, int] | None = None
    """How many first and last blocks the search kept."""
    sublayers: Mapping[tuple[int, str], float] = field(default_factory=dict)
    """(block, attention or mlp) -> perplexity without that part."""

    @property
    def available(self) -> tuple[str, ...]:
        """The criteria that these scores can rank by."""
        named = [c for c in self.columns if c != GENERIC and self._any(c)]
        if self._any(GENERIC):
            named.append(GENERIC)
        named += ["angular"] if self.angular else []
        named += ["sleb"] if self.greedy else []
        named += [SUBLAYERS] if self.sublayers else []
        methods = list(dict.fromkeys(row.method for row in self.sets if row.method in CRITERIA))
        return (*named, *methods, *([BEST] if methods else []))

    def _any(self, column: str) -> bool:
        return any(value is not None for value in self.columns.get(column, ()))

    def values(self, criterion: str) -> tuple[float, ...]:
        """Return one finite or infinite score per block.

        Raises `DataError` if the criterion was not scored, or a score is missing or NaN.
        """
        name = canonical(criterion)
        column = self.columns.get(name) if self._any(name) else self.columns.get(GENERIC)
        if column is None or all(value is None for value in column):
            raise DataError(
                f"{self.source} has no {name} scores.",
                f"It has: {', '.join(self.available) or 'none'}.",
            )
        checked: list[float] = []
        for block, value in enumerate(column):
            if value is None or math.isnan(value):
                what = "missing" if value is None else "NaN"
                raise DataError(
                    f"The {name} score of block {block} in {self.source} is {what}.",
                    "Re-run importance, or choose another criterion.",
                )
            checked.append(value)
        return tuple(checked)

    def found(self, method: str) -> dict[int, Removal]:
        """Return the set that a method of search (or ``best``) found for every count.

        Raises `DataError` if it found none.
        """
        rows = by_count(self.sets, method)
        if not rows:
            raise DataError(
                f"{self.source} has no sets of blocks found by {method}.",
                f"It has: {', '.join(self.available)}."
                if self.sets
                else f"Give a run of search with --methods {method}."
                if method != BEST
                else "Give a run of search.",
            )
        return {count: row.removal for count, row in rows.items()}

    def part_order(self, missing: Collection[tuple[int, str]] = ()) -> tuple[tuple[int, str], ...]:
        """Return (block, attention or mlp) of every part in removal order; ties as blocks run.

        ``missing`` are the parts that the model lacks, which have no scores.

        Raises `DataError` if parts were not scored, or a score is missing or NaN.
        """
        if not self.sublayers:
            raise DataError(
                f"{self.source} has no scores of parts of blocks.",
                f"Score the checkpoint with the metric {SUBLAYERS}, or choose another criterion.",
            )
        every = [(block, part) for block in range(self.blocks) for part in PARTS]
        parts = [unit for unit in every if unit not in missing]
        for block, part in parts:
            value = self.sublayers.get((block, part))
            if value is None or math.isnan(value):
                what = "missing" if value is None else "NaN"
                raise DataError(
                    f"The score of block {block} without its {PARTS[part]} in {self.source} is "
                    f"{what}.",
                    "Re-run importance, or choose another criterion.",
                )
        return tuple(sorted(parts, key=self.sublayers.__getitem__))

    def order(self, criterion: str) -> tuple[int, ...]:
        """Return all blocks in removal order; ties go to the lower block number."""
        scores = self.values(criterion)
        return tuple(sorted(range(self.blocks), key=lambda block: (scores[block], block)))


def load(path: str | Path) -> BlockScores:
    """Read the folder of an importance or search run (or its id), or a CSV of block scores.

    CSV files may have the columns ``block,score``, ``block_name,block_score``,
    ``removed_block,ppl_bookcorpus,...`` or those of ``blocks.csv``; rows of the final norm and
    the head are ignored. One line with the number of every block is a removal order, as in the
    authors' ``block_order.csv``. A CSV with ``block,part,ppl`` scores parts of blocks.

    Raises `DataError` if the scores are missing or inconsistent.
    """
    given = workspace.located(path)
    if given is None:
        raise DataError(
            f"No scores found at {outside.brief(str(path), 200)}.",
            "Give an importance run's folder or a CSV file.",
        )
    if not outside.is_folder(given):
        return _from_csv(given, str(path))
    if outside.is_file(given / SetRow.FILE):
        return _from_search(given, str(path))
    if not outside.is_file(given / BlockRow.FILE):
        raise DataError(
            f"{path} has no blocks.csv, so it is not a finished importance run.",
            "Give a finished importance run's folder or a CSV file.",
        )
    scores = _from_csv(given / BlockRow.FILE, str(path))
    return BlockScores(
        scores.source,
        scores.blocks,
        scores.columns,
        _angular(given / AngularRow.FILE, scores.blocks),
        _greedy(given / GreedyRow.FILE, scores.blocks),
        _checkpoint_of(given),
        sublayers=_sublayers(given / SublayerRow.FILE, scores.blocks),
    )


def _from_search(folder: Path, name: str) -> BlockScores:
    found, rows = Search.read(folder), SetRow.read(folder)
    sets = tuple(row for row in rows if len(row.units) == row.count > 0)
    blocks = found.blocks if found else 0
    if not found or not sets or any(max(row.removal.touched) >= blocks for row in sets):
        raise DataError(
            f"{name} has no usable sets of blocks, so it is not a finished search.",
            "Run search again, with --resume to continue it.",
        )
    return BlockScores(
        name,
        blocks,
        {},
        checkpoint=found.checkpoint or None,
        sets=sets,
        part_sets=found.units != "block",
        protected=(found.protect_first, found.protect_last),
    )


def _checkpoint_of(folder: Path) -> str | None:
    saved = workspace.read_json(folder / workspace.BOOKKEEPING / "spec.json") or {}
    found = Importance.read(folder)
    name = (saved.get("spec") or {}).get("checkpoint") or (found.checkpoint if found else "")
    return str(name) if name else None


def _rows(path: Path, name: str) -> list[dict[str, str | None]]:
    try:
        return outside.table(path)
    except (OSError, outside.Malformed) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"Cannot read the scores in {name}: {reason}.", "Give a CSV file."
        ) from None


def _order(path: Path) -> tuple[int, ...]:
    """Read a removal order: one line of block numbers, as the authors' block_order.csv.

    Empty if the file is something else.
    """
    try:
        lines = outside.text(path).split()
    except (OSError, outside.Malformed):
        return ()
    cells = lines[0].split(",") if len(lines) == 1 else []
    numbers = tuple(int(cell) for cell in cells if cell.isdecimal() and len(cell) < 7)
    whole = len(cells) > 1 and sorted(numbers) == list(range(len(cells)))
    return numbers if whole else ()


def _from_csv(path: Path, name: str) -> BlockScores:
    if order := _order(path):
        ranks = tuple(float(order.index(block)) for block in range(len(order)))
        return BlockScores(name, len(order), {GENERIC: ranks})
    rows = _rows(path, name)
    header = [key for key in (rows[0] if rows else {}) if key]
    if set(SublayerRow.columns()) <= set(header):
        found = _part_scores(rows, name)
        return BlockScores(name, 1 + max(block for block, _ in found), {}, sublayers=found)
    id_column = next((column for column in _ID_COLUMNS if column in header), None)
    known = {column: _COLUMNS[column] for column in header if column in _COLUMNS}
    if id_column is None or not known:
        raise DataError(
            f"{name} is not a table of block scores: its columns are "
            f"{outside.brief(', '.join(header), 200) or 'none'}.",
            "It needs block,score, or block_name,block_score, or removed_block,ppl_bookcorpus.",
        )
    table: dict[str, dict[int, float | None]] = {column: {} for column in known}
    for line, row in enumerate(rows, start=2):
        block = _block(row[id_column], name, line)
        if block is None:
            continue
        for column in known:
            if block in table[column]:
                raise DataError(f"{name} has block {block} twice.", "Give each block one row.")
            table[column][block] = _number(row[column], name, line)
    first = table[next(iter(known))]
    # as many rows as blocks, so no range is longer than the file
    absent = next((block for block in range(len(first)) if block not in first), None)
    if not first or absent is not None:
        raise DataError(f"{name} has no row for block {absent or 0}.", "Give each block one row.")
    columns = {known[c]: tuple(table[c][b] for b in range(len(first))) for c in known}
    return BlockScores(name, len(first), columns)


def _block(text: str | None, name: str, line: int) -> int | None:
    """Read ``3``, ``3.0`` or ``model.layers.3``; None for rows that are not blocks."""
    text = (text or "").strip()
    if text.startswith(_PREFIX):
        text = text[len(_PREFIX) :].split(".")[0]
    elif text.startswith(("model.", "lm_head")):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise DataError(
            f"{name}, line {line}: '{outside.brief(text)}' is not a block number.",
            "Use 0, 1, 2 and so on.",
        )
    return int(value)


def _number(text: str | None, name: str, line: int) -> float | None:
    text = (text or "").strip()
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise DataError(
            f"{name}, line {line}: '{outside.brief(text)}' is not a number.",
            "Give every block a numeric score.",
        ) from None


def _greedy(path: Path, blocks: int) -> tuple[int, ...]:
    """Read the order of greedy removal; empty if there was no search."""
    if not outside.is_file(path):
        return ()
    found = [
        _block(row.get("block"), str(path), n) for n, row in enumerate(_rows(path, str(path)), 2)
    ]
    order = tuple(b for b in found if b is not None and b < blocks)
    if len(set(order)) != len(found):
        raise DataError(f"{path} has duplicate or missing blocks.", "Re-run importance.")
    return order


def _sublayers(path: Path, blocks: int) -> dict[tuple[int, str], float]:
    if not outside.is_file(path):
        return {}
    found = _part_scores(_rows(path, str(path)), str(path))
    return {unit: value for unit, value in found.items() if unit[0] < blocks}


def _part_scores(rows: list[dict[str, str | None]], name: str) -> dict[tuple[int, str], float]:
    found: dict[tuple[int, str], float] = {}
    for line, row in enumerate(rows, start=2):
        block, part = _block(row.get("block"), name, line), (row.get("part") or "").strip().lower()
        if block is None or part not in PARTS:
            raise DataError(
                f"{name}, line {line}: '{outside.brief(part)}' is not a part of a block.",
                f"Use {' or '.join(PARTS)}.",
            )
        if (block, part) in found:
            raise DataError(
                f"{name} has the {PARTS[part]} of block {block} twice.", "Give each part one row."
            )
        value = _number(row.get("ppl"), name, line)
        if value is not None:
            found[block, part] = value
    if len(found) > len(rows) or (found and max(found)[0] >= len(rows)):
        raise DataError(f"{name} does not have a row for every part.", "Give each part one row.")
    return found


def _angular(path: Path, blocks: int) -> dict[tuple[int, int], float]:
    if not outside.is_file(path):
        return {}
    result: dict[tuple[int, int], float] = {}
    for line, row in enumerate(_rows(path, str(path)), start=2):
        try:
            start, length = int(row["start"] or ""), int(row["length"] or "")
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, line {line}: start and length must be whole numbers.",
                "Re-run importance.",
            ) from None
        value = _number(row.get("distance"), str(path), line)
        if value is not None and length >= 1 and start >= 0 and start + length <= blocks:
            result[start, length] = value
    return result
