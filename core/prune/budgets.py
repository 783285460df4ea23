"""Solve for what every block becomes, given budgets for time, memory and parameters; no torch.

One version is chosen for every block, so that the summed KL is least and every budget is kept: a
mixed integer program (Puzzle, arXiv 2411.19146), solved by SciPy's HiGHS in milliseconds. With pair
terms, what two dropped blocks cost beyond the sum of both alone counts too, as linearised products.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import outside
from core.checkpoint.drop import Removal
from core.errors import DataError, OptionError, PlanError
from core.prune.set_results import Search
from core.prune.version_results import (
    MLP_SHARES,
    OUTPUT_TOKENS,
    VERSIONS,
    WHOLE,
    Budget,
    PlanCheck,
    VersionRow,
)
from core.runs.results import CsvRow

GIB = 2**30
SOLVE_S = 10.0
"""Most time for one solution. Programs without pair terms take milliseconds."""
FEWEST = 4
"""Plans measured whole from which on predicted KLs are corrected by them. Chosen."""
_SCALE = 1e3
"""Every budget is this number in the program: the solver's tolerance of 1e-6 is then 1e-9 of it."""

Choice = tuple[str, ...]
"""One version per block."""


@dataclass(frozen=True)
class Limits:
    """Budgets that all have to be kept; None is none."""

    latency: float | None = None
    """Most time of a generation, as a share of the dense model's."""
    tokens_per_s: float | None = None
    """Least throughput of all sequences together."""
    memory_gib: float | None = None
    """Most memory of weights and key/value cache."""
    params: int | None = None
    """Most parameters."""

    @property
    def given(self) -> dict[str, float]:
        """The budgets that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Figures:
    """What a choice of versions gives: kl and times are predicted, sizes exact."""

    kl: float
    prefill_s: float
    decode_s: float
    latency_s: float
    tokens_per_s: float
    params: int
    weight_bytes: int
    cache_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Weights and key/value cache."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Solution:
    """What every block becomes."""

    library: Library
    choice: Choice
    figures: Figures
    optimal: bool = True
    """Whether the time limit was not reached before this was proven to be the best."""

    @property
    def removal(self) -> Removal:
        """The same as blocks and parts that go."""
        return self.library.removal(self.choice)


@dataclass(frozen=True)
class Library:
    """The measured versions of all blocks."""

    source: str
    """The run's folder, as it was named."""
    summary: Budget
    rows: Mapping[tuple[int, str], VersionRow]
    pairs: Mapping[tuple[int, int], float]
    """What two dropped blocks cost beyond the sum of both alone, in nats; empty: not measured."""
    checks: tuple[tuple[float, float], ...] = ()
    """(predicted, measured) KL of the solved plans that the run measured whole."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.summary.blocks

    def options(self, block: int) -> list[str]:
        """Return what a block can become, whole first; versions without a finite KL are out."""
        found = [WHOLE]
        for version in VERSIONS:
            row = self.rows.get((block, version))
            if row is not None and row.kl is not None and math.isfinite(row.kl):
                found.append(version)
        return found

    def seconds(self, block: int, version: str, output_tokens: int) -> float:
        """Return the seconds of a block in a generation of ``output_tokens`` tokens."""
        row = self.rows[block, version]
        return (row.prefill_s or 0.0) + (output_tokens - 1) * (row.decode_s or 0.0)

    def rest_seconds(self, output_tokens: int) -> float:
        """Return the seconds of everything outside the blocks in such a generation."""
        found = self.summary
        return (found.rest_prefill_s or 0.0) + (output_tokens - 1) * (found.rest_decode_s or 0.0)

    def kl(self, block: int, version: str) -> float:
        """Return a version's KL; rounding below 0 counts as 0."""
        return 0.0 if version == WHOLE else max(0.0, self.rows[block, version].kl or 0.0)

    def figures(self, choice: Sequence[str], output_tokens: int = OUTPUT_TOKENS) -> Figures:
        """Return what a choice gives, predicted from its versions one by one and the pairs."""
        found = self.summary
        rows = [self.rows[block, version] for block, version in enumerate(choice)]
        prefill = (found.rest_prefill_s or 0.0) + sum(row.prefill_s or 0.0 for row in rows)
        decode = (found.rest_decode_s or 0.0) + sum(row.decode_s or 0.0 for row in rows)
        latency = prefill + (output_tokens - 1) * decode
        gone = {block for block, version in enumerate(choice) if version == "drop"}
        beyond = sum(v for (a, b), v in self.pairs.items() if a in gone and b in gone)
        return Figures(
            kl=sum(self.kl(block, version) for block, version in enumerate(choice)) + beyond,
            prefill_s=prefill,
            decode_s=decode,
            latency_s=latency,
            tokens_per_s=found.batch * output_tokens / latency if latency > 0 else 0.0,
            params=found.rest_params + sum(row.params for row in rows),
            weight_bytes=found.rest_weight_bytes + sum(row.weight_bytes for row in rows),
            cache_bytes=sum(row.cache_bytes for row in rows),
        )

    def removal(self, choice: Sequence[str]) -> Removal:
        """Return what goes if every block becomes the version in ``choice``."""

        def blocks(version: str) -> tuple[int, ...]:
            return tuple(block for block, name in enumerate(choice) if name == version)

        width = tuple(
            (block, self.rows[block, version].neurons)
            for block, version in enumerate(choice)
            if version in MLP_SHARES
        )
        whole = (blocks("drop"), blocks("no-attention"), blocks("no-mlp"))
        return Removal(*whole, width, self.source if width else "")

    def dense(self, output_tokens: int = OUTPUT_TOKENS) -> Figures:
        """Return the whole model's figures, by the same prediction as everything else."""
        return self.figures((WHOLE,) * self.blocks, output_tokens)


def is_run(folder: Path) -> bool:
    """Whether a folder holds the table of a budget run."""
    return outside.is_file(folder / VersionRow.FILE)


def load(folder: Path, name: str = "", pairs: Path | None = None) -> Library:
    """Read a budget run; ``pairs`` is the folder of a search whose pair terms count too.

    Raises `DataError` if the table is incomplete, or if the pairs are of other weights or were not
    measured by KL.
    """
    name = name or str(folder)
    found, rows = Budget.read(folder), VersionRow.read(folder)
    table = {(row.block, row.version): row for row in rows if row.version in (WHOLE, *VERSIONS)}
    blocks = found.blocks if found else 0
    if not found or blocks < 1 or any((block, WHOLE) not in table for block in range(blocks)):
        raise DataError(
            f"{name} is not a finished budget run: versions.csv has no row for every block.",
            "Run budget again.",
        )
    checks = tuple((row.predicted_kl, row.kl or 0.0) for row in PlanCheck.read(folder))
    return Library(name, found, table, _pairs(pairs, found) if pairs else {}, checks)


def corrected_kl(library: Library, kl: float) -> float | None:
    """Return the KL to expect of a plan with the predicted ``kl``, by the plans measured whole.

    A sum of blocks that were changed alone is too low the more goes. What solved plans measured is
    divided by what was predicted of them, and the factor interpolated over the predicted KL, both
    logarithmically; outside of them the nearest plan's factor holds. None if the run measured fewer
    than `FEWEST` plans, or with pair terms, which those predictions did not have.
    """
    return None if library.pairs else _corrected(_points(library), kl)


def correction_error(library: Library) -> float | None:
    """Return the median relative error of `corrected_kl` for each measured plan by the others."""
    points = _points(library)
    errors = []
    for at, (place, factor) in enumerate(points):
        found = _corrected([*points[:at], *points[at + 1 :]], math.exp(place))
        if found is not None:
            errors.append(abs(found / math.exp(place + factor) - 1))
    return statistics.median(errors) if errors and not library.pairs else None


def _points(library: Library) -> list[tuple[float, float]]:
    """Return (log of the predicted KL, log of measured over predicted), rising."""
    usable = [(p, m) for p, m in library.checks if p > 0 and m > 0 and math.isfinite(p + m)]
    return sorted((math.log(p), math.log(m / p)) for p, m in usable)


def _corrected(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    if len(points) < FEWEST or kl <= 0:
        return None
    place = math.log(kl)
    after = bisect.bisect([x for x, _ in points], place)
    (low, first), (high, last) = points[max(after - 1, 0)], points[min(after, len(points) - 1)]
    share = (place - low) / (high - low) if high > low else 0.0
    return kl * math.exp(first + share * (last - first))


@dataclass(frozen=True)
class _Pair(CsvRow):
    """What is needed of a row of pairs.csv."""

    FILE = "pairs.csv"

    block_a: int
    block_b: int
    interaction: float


def _pairs(folder: Path, budget: Budget) -> dict[tuple[int, int], float]:
    search, rows = Search.read(folder), _Pair.read(folder)
    if search is None or not rows:
        raise DataError(
            f"{folder} has no measured pairs of blocks.",
            "Give a run of search with --methods pairs, or leave --pairs out.",
        )
    if search.objective != "kl" or search.heal != "none":
        raise DataError(
            f"The pairs in {folder} were not measured by the KL of the plain cut.",
            "Give a run of search with --objective kl and without --heal.",
        )
    if search.units != "block":
        raise DataError(
            f"The pairs in {folder} are of parts of blocks, not of whole blocks.",
            "Give a run of search with --units block.",
        )
    if search.checkpoint_key != budget.checkpoint_key:
        raise DataError(
            f"The pairs in {folder} belong to other weights than the budget run.",
            "Give a search of the same checkpoint.",
        )
    if search.calibration_content != budget.calibration_content:
        texts = [Path(found.calibration or "").name for found in (search, budget)]
        raise DataError(
            f"The pairs in {folder} were measured on {texts[0]}, the budget run on {texts[1]}: "
            "costs on different texts cannot be added up.",
            "Give a search on the same text, or leave --pairs out.",
        )
    blocks = range(budget.blocks)
    return {
        (row.block_a, row.block_b): row.interaction
        for row in rows
        if row.block_a in blocks and row.block_b in blocks and math.isfinite(row.interaction)
    }


def check(limits: Limits, output_tokens: int) -> None:
    """Raise `OptionError` for budgets that mean nothing."""
    for name, value in limits.given.items():
        if value <= 0:
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag} must be above 0, got {value:g}.")
    if limits.latency is not None and limits.latency >= 1:
        raise OptionError(
            f"--latency {limits.latency:g} is not below the dense model's, which is 1.",
            "Give a share, e.g. 0.8 for four fifths of the dense model's time.",
        )
    if output_tokens < 1:
        raise OptionError(f"--output-tokens must be at least 1, got {output_tokens}.")


def solve(
    library: Library,
    limits: Limits,
    *,
    output_tokens: int = OUTPUT_TOKENS,
    protect: tuple[int, int] = (0, 0),
) -> Solution:
    """Return the versions with the least predicted KL within all ``limits``.

    The first and last ``protect`` blocks stay whole, and one block at least stays.

    Raises:
        OptionError: A budget means nothing, or none is given.
        PlanError: Protection leaves nothing to change, the whole model keeps the budgets, or no
            choice does; the message then names the least possible.
    """
    check(limits, output_tokens)
    if not limits.given:
        raise OptionError(
            "No budget is given.", "Give --latency, --tokens-per-s, --memory-gib or --params."
        )
    program = _Program(library, limits, output_tokens, protect)
    if not program.free:
        first, last = protect
        raise PlanError(
            f"Protecting the first {first} and last {last} of {library.blocks} blocks leaves none "
            "to change.",
            "Lower --protect-first or --protect-last.",
        )
    found = program.best(program.costs)
    if found is None:
        raise PlanError(*program.out_of_reach())
    choice, optimal = found
    if set(choice) == {WHOLE}:
        raise PlanError(
            "The whole model keeps this budget already: nothing has to go.",
            "Give a tighter budget.",
        )
    return Solution(library, choice, library.figures(choice, output_tokens), optimal)


def least(
    library: Library,
    name: str,
    *,
    output_tokens: int = OUTPUT_TOKENS,
    protect: tuple[int, int] = (0, 0),
) -> float:
    """Return the least (of tokens_per_s the largest) value that the budget ``name`` can have."""
    program = _Program(library, Limits(), output_tokens, protect)
    found = program.best(program.amounts(name))
    assert found is not None  # keeping everything is always possible
    return value_of(library, name, found[0], output_tokens)


def frontier(
    library: Library,
    count: int,
    *,
    output_tokens: int = OUTPUT_TOKENS,
    protect: tuple[int, int] = (0, 0),
) -> list[tuple[float, Solution]]:
    """Return up to ``count`` solutions for latency budgets at even distances, the mildest first.

    Each with its budget; the last one is close to the least possible.
    """
    low = least(library, "latency", output_tokens=output_tokens, protect=protect)
    found: dict[Choice, tuple[float, Solution]] = {}
    for number in range(1, count + 1):
        limit = 1 - (1 - low) * number / (count + 0.5)
        if not 0 < limit < 1:
            continue
        solved = solve(library, Limits(latency=limit), output_tokens=output_tokens, protect=protect)
        found.setdefault(solved.choice, (limit, solved))
    return list(found.values())


def value_of(
    library: Library, name: str, choice: Sequence[str], output_tokens: int = OUTPUT_TOKENS
) -> float:
    """Return what a choice makes of the budget ``name``, in that budget's unit."""
    figures = library.figures(choice, output_tokens)
    if name == "latency":
        return figures.latency_s / library.dense(output_tokens).latency_s
    if name == "tokens_per_s":
        return figures.tokens_per_s
    return figures.memory_bytes / GIB if name == "memory_gib" else float(figures.params)


class _Program:
    """The binaries of a mixed integer program: one for every version that a block can become."""

    def __init__(
        self, library: Library, limits: Limits, output_tokens: int, protect: tuple[int, int]
    ) -> None:
        self.library, self.limits, self.tokens = library, limits, output_tokens
        self.protect = protect
        blocks = range(library.blocks)
        inner = range(protect[0], library.blocks - protect[1])
        self.options = [library.options(b) if b in inner else [WHOLE] for b in blocks]
        self.free = [b for b in blocks if len(self.options[b]) > 1]
        self.variables = [(b, v) for b in blocks for v in self.options[b]]

    @property
    def costs(self) -> list[float]:
        """The predicted KL of every variable."""
        return [self.library.kl(block, version) for block, version in self.variables]

    def amounts(self, name: str) -> list[float]:
        """Return what every variable adds to the quantity that the budget ``name`` limits."""
        if name in ("latency", "tokens_per_s"):
            return [self.library.seconds(b, v, self.tokens) for b, v in self.variables]
        rows = [self.library.rows[one] for one in self.variables]
        if name == "params":
            return [float(row.params) for row in rows]
        return [float(row.weight_bytes + row.cache_bytes) for row in rows]

    def _room(self, name: str, value: float) -> float:
        """Return how much of that quantity the blocks may take, without the rest of the model."""
        found = self.library.summary
        if name == "params":
            return value - found.rest_params
        if name == "memory_gib":
            return value * GIB - found.rest_weight_bytes
        rest = self.library.rest_seconds(self.tokens)
        if name == "tokens_per_s":
            return found.batch * self.tokens / value - rest
        return value * self.library.dense(self.tokens).latency_s - rest

    def best(self, costs: Sequence[float]) -> tuple[Choice, bool] | None:
        """Return the choice with the least summed ``costs``, and whether that is proven.

        None if no choice keeps the limits. Pair terms count if the costs are the KL's.
        """
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        count = len(self.variables)
        place = {one: at for at, one in enumerate(self.variables)}
        pairs = self.library.pairs if list(costs) == self.costs else {}
        products = [
            (value, place[a, "drop"], place[b, "drop"])
            for (a, b), value in pairs.items()
            if value and (a, "drop") in place and (b, "drop") in place
        ]
        lines: list[tuple[dict[int, float], float, float]] = []
        for block, options in enumerate(self.options):
            lines.append(({place[block, version]: 1.0 for version in options}, 1.0, 1.0))
        dropped = {place[one]: 1.0 for one in self.variables if one[1] == "drop"}
        lines.append((dropped, 0.0, self.library.blocks - 1.0))
        for name, value in self.limits.given.items():
            room = self._room(name, value)
            if room <= 0:
                return None
            amounts = enumerate(self.amounts(name))
            lines.append(({at: _SCALE * v / room for at, v in amounts}, 0.0, _SCALE * (1 + 1e-9)))
        for number, (value, a, b) in enumerate(products, start=count):
            if value > 0:  # the product is at least a + b - 1, and as small as it may be
                lines.append(({a: 1.0, b: 1.0, number: -1.0}, -np.inf, 1.0))
            else:
                lines += [({number: 1.0, one: -1.0}, -np.inf, 0.0) for one in (a, b)]
        size = count + len(products)
        values = [v for line, _, _ in lines for v in line.values()]
        at = [c for line, _, _ in lines for c in line]
        starts = [0, *itertools.accumulate(len(line) for line, _, _ in lines)]
        matrix = csr_array((values, at, starts), shape=(len(lines), size))
        found = milp(
            np.array([*costs, *(value for value, _, _ in products)]),
            integrality=np.array([1] * count + [0] * len(products)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(
                matrix, [low for _, low, _ in lines], [high for _, _, high in lines]
            ),
            options={"time_limit": SOLVE_S, "mip_rel_gap": 1e-9},
        )
        if found.x is None:
            return None
        chosen = {self.variables[at] for at in range(count) if found.x[at] > 0.5}
        choice = tuple(
            next(v for v in options if (block, v) in chosen)
            for block, options in enumerate(self.options)
        )
        return choice, found.status == 0

    def out_of_reach(self) -> tuple[str, str]:
        """Return why the limits cannot be kept, with the least possible of each."""
        tokens, protect = self.tokens, self.protect
        given = self.limits.given
        ends = {
            name: least(self.library, name, output_tokens=tokens, protect=protect) for name in given
        }
        first, last = protect
        kept = f"with the first {first} and last {last} of {self.library.blocks} blocks whole"
        kept += f" and these versions: {', '.join(self.library.summary.measured)}"
        alone = [
            name
            for name, value in given.items()
            if (ends[name] < value if name == "tokens_per_s" else ends[name] > value)
        ]
        flags = {name: f"--{name.replace('_', '-')}" for name in given}
        if alone:
            what = "; ".join(f"{flags[n]} {_shown(n, given[n])}" for n in alone)
            reach = "; ".join(
                f"{flags[n]}: the {'most' if n == 'tokens_per_s' else 'least'} possible is "
                f"{_shown(n, ends[n], outwards=True)}"
                for n in alone
            )
            return f"No plan reaches {what}.", f"{reach}, {kept}."
        each = ", ".join(f"{flags[n]} {_shown(n, ends[n], outwards=True)}" for n in given)
        return (
            "No plan keeps all these budgets at once, though each can be kept alone.",
            f"Alone the ends are {each}, {kept}.",
        )


def _shown(name: str, value: float, *, outwards: bool = False) -> str:
    """Format a budget's value; ``outwards`` rounds it so that it can still be reached."""
    if name == "params":
        return f"{math.ceil(value):,}"
    if not outwards:
        return f"{value:g}"
    digits = 10.0 ** (3 - math.floor(math.log10(value))) if value > 0 else 1.0
    ends = math.floor if name == "tokens_per_s" else math.ceil
    return f"{ends(value * digits) / digits:g}"
