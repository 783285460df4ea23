"""The one verdict on a study: which variant to take, and the best by quality, speed and memory.

Compare, Presentation, the report, findings and recipes all ask `verdict_of`. It compares variants
of one size, depth and width alike: those within the study's targets, else those of the size that
most of them have. Quality is perplexity on the study's evaluation text (`protocol_of`); the study's
tasks stand beside it. A rank has measured costs only, or estimated ones if nothing was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from core.benchmark.analytic import Rates
from core.compare import answers, choice
from core.compare.answers import Answers
from core.compare.candidates import Candidate
from core.compare.measured import Cell, comparable
from core.compare.outcomes import Outcome
from core.compare.scene import Scene, scene
from core.compare.speed import NOISY, Speed, speeds_at
from core.retrain.shares import Share, between, sentence
from core.study import Protocol, Study
from core.study.keeping import kept
from core.study.settings import Settings, same_text, short
from core.words import listed, percent, rounded, size

NEAR = 0.02
"""Ratios this close are the same size."""
TARGET_NEAR = 0.05
"""A target for the ratio is met this close to it: blocks are whole."""
USUAL = 0.2
"""Share of parameters removed that is looked at first: the moderate pruning of the paper."""
LARGE = 1.5
"""Times the dense perplexity from which a variant has lost too much. Published width baselines of
LLaMA-7B at 20 % without retraining are between 1.16 (FLAP) and 1.75 (Wanda-sp)."""
SMALLER = 0.98
"""Share of the dense model's memory below which memory counts as saved."""
ALIKE = 0.01
"""Costs this close are equal, if nothing says how noisy they are."""
AS_FAST = "as fast as dense"
UNMEASURED = "nothing has been measured"
SEEN = 0.005
"""A noise below this is not written: it would read 0 %."""
MIB = 2**20


@dataclass(frozen=True)
class Figure:
    """One figure of a variant beside the dense model's, and how it is known."""

    value: float
    dense: float | None = None
    how: str = "measured"
    """measured or estimated."""
    noise: float | None = None
    """Relative uncertainty of ``times``; None if unknown."""

    @property
    def times(self) -> float | None:
        """The value over the dense model's."""
        return self.value / self.dense if self.dense else None


@dataclass(frozen=True)
class Contender:
    """A variant with everything that the verdict weighs; None for what is unknown."""

    candidate: Candidate
    ppl: Figure | None = None
    answers: tuple[Answers, ...] = ()
    """On tasks whose answers are chosen among given ones."""
    written: tuple[Answers, ...] = ()
    """On tasks whose answers the model writes itself; never part of the mean."""
    speed: Figure | None = None
    """Times as fast as the dense model; ``dense`` is 1."""
    memory: Figure | None = None
    """Peak memory in MiB."""
    per_token_ms: float | None = None
    shares: tuple[Share, ...] = ()
    """What retraining brought back, on held-out rows and on the text that decides."""

    @property
    def id(self) -> str:
        """Id of the candidate."""
        return self.candidate.id

    @property
    def label(self) -> str:
        """Label of the candidate."""
        return self.candidate.label

    @property
    def noun(self) -> str:
        """The label as a sentence names it: one that says what is gone needs a noun before it."""
        return f"the model {self.label}" if self.label.startswith("without ") else self.label

    @property
    def subject(self) -> str:
        """The label as a sentence begins with it."""
        return self.noun if self.noun == self.label else self.noun[0].upper() + self.noun[1:]

    @property
    def ratio(self) -> float:
        """Share of the parameters removed."""
        return self.candidate.ratio or 0.0

    @property
    def recovery(self) -> str:
        """What retraining brought back by loss and by KL; empty if that is not known."""
        return sentence(self.shares)

    @property
    def accuracy(self) -> float | None:
        """Mean share of right answers over its tasks."""
        found = answers.mean(self.answers)
        return found[0] if found else None

    @property
    def is_faster(self) -> bool:
        """Whether it is faster than the dense model, beyond the noise."""
        return self.speed is not None and self.speed.value - 1 > (self.speed.noise or ALIKE)

    @property
    def is_smaller(self) -> bool:
        """Whether it needs less memory than the dense model."""
        return self.memory is not None and (self.memory.times or 1.0) < SMALLER

    @property
    def pays(self) -> bool:
        """Whether it gains speed or memory and keeps most of the quality."""
        kept = self.ppl is not None and (self.ppl.times or math.inf) < LARGE
        return kept and (self.is_faster or self.is_smaller)


@dataclass(frozen=True)
class Verdict:
    """Which variant to take, the winners, and everything they were chosen from."""

    study: Study
    settings: Settings
    protocol: Protocol | None
    """How quality was measured; None if it was not."""
    cell: Cell
    """Batch, input and output tokens of speed and memory."""
    where: str
    """Device that the costs were measured on; empty if they are estimates."""
    found: tuple[Contender, ...]
    """Every checkpoint of the study, the dense one first, then plans."""
    group: tuple[Contender, ...]
    """The ones of one size, or within the targets, that the winners are of."""
    words: str
    """What the group has in common."""
    missed: bool = False
    """Whether nothing is within the targets, so that the group is only near them."""
    quality: Contender | None = None
    speed: Contender | None = None
    memory: Contender | None = None
    tasks: Contender | None = None
    """The best by tasks, if they were asked."""

    @property
    def take(self) -> Contender | None:
        """The variant to take: the best by quality, else by tasks, speed or memory."""
        return self.quality or self.tasks or self.speed or self.memory

    @property
    def dense(self) -> Contender:
        """The dense model."""
        return self.found[0]

    @property
    def pays(self) -> bool:
        """Whether the variant to take is worth it."""
        return self.take is not None and self.take.pays

    @property
    def option(self) -> Contender | None:
        """If the group does not pay: the largest cut of any size that does; None without one."""
        made = [c for c in self.found[1:] if c.pays and not c.candidate.is_plan]
        return max(made, key=lambda c: (c.ratio, -_times(c)), default=None)

    def sizes(self) -> list[Contender]:
        """Return the best by quality of every size, ascending: checkpoints, else plans."""
        by_size: dict[float, list[Contender]] = {}
        for one in self.found[1:]:
            if one.ratio and one.candidate.is_made:
                by_size.setdefault(round(one.ratio, 3), []).append(one)
        best = (
            min(same, key=lambda c: (c.candidate.is_plan, *_by_quality(c)))
            for _, same in sorted(by_size.items())
        )
        return [c for c in best if c.ppl or c.speed]

    def best(self, kind: str) -> Contender | None:
        """Return the best by quality of the group's depth or width variants."""
        mine = [c for c in self.group if c.candidate.kind == kind and c.ppl]
        return min(mine, key=_by_quality, default=None)

    def before(self, one: Contender) -> Contender | None:
        """Return what a retrained variant was before retraining; None if it was not retrained."""
        return self.of(one.candidate.parent) if one.candidate.retrained else None

    def of(self, variant: str) -> Contender | None:
        """Return a checkpoint or plan by its id."""
        return next((c for c in self.found if c.id == variant), None)

    @property
    def text(self) -> str:
        """What quality was measured on, in a word or two."""
        return "" if self.protocol is None else text_of(self.protocol)

    @property
    def measured_on(self) -> str:
        """What the figures are relative to, and what they were measured on."""
        batch, given, made = self.cell
        text = f"All figures are relative to the dense model, {self.dense.label}."
        if self.protocol:
            text += f" Perplexity measured: {self.protocol.label}."
        text += f" Speed and memory at batch {batch}, {given} tokens in, {made} out"
        return text + (f", on {self.where}." if self.where else ".")

    @property
    def sentence(self) -> str:
        """The verdict in a few sentences; empty if nothing was measured."""
        return f"{self.headline} {self.rest}".strip()

    @property
    def headline(self) -> str:
        """The first sentence: what to take and why, or that pruning does not pay."""
        take = self.take
        if take is None:
            return ""
        facts, lead = self.facts(take, sized=not self._is_sized), self._lead(take)
        if take.ppl is None:
            return f"{lead}: {facts}. Its perplexity has not been measured."
        if not (take.speed or take.memory):
            return f"{lead}: {facts}. Its cost is unknown."
        if take.pays:
            return f"{lead}: {facts}."
        others = replace(take, ppl=None) if _has_lost(take) else take
        others = replace(others, speed=None) if _is_as_fast(take) else others
        facts = self.facts(others, sized=not self._is_sized)
        return f"{lead}; {facts}." if facts != UNMEASURED else f"{lead}."

    @property
    def short(self) -> str:
        """The headline without the figures that stand beside it on a slide."""
        take = self.take
        if take is None:
            return ""
        lead = self._lead(take)
        if take.ppl is None:
            return f"{lead}; its perplexity has not been measured."
        if not (take.speed or take.memory):
            return f"{lead}; its cost is unknown."
        if not take.pays:
            return f"{lead}."
        gains = [f"is {_pace(take.speed)}"] if take.speed and take.is_faster else []
        if take.is_smaller and take.memory:
            gains.append(f"needs {_share(take.memory)}")
        return f"{lead}: it {listed(gains)}, at {_times(take):.2f} times the dense perplexity."

    def _lead(self, take: Contender) -> str:
        """Return what to take and of how many it is the best, or why pruning does not pay."""
        count = sum(c.ppl is not None for c in self.group) if take.ppl else len(self.group)
        others = f"the best of {count} variants {self.words}"
        if count == 1:
            others = f"the only variant {self.words}"
        if self.missed:
            others += ", as none is within the targets"
        if take.ppl is None:
            why = "answers most questions" if self.tasks else "is the fastest"
            if not (self.tasks or self.speed):
                why = "needs least memory"
            return f"{take.subject} {why}"
        if not (take.speed or take.memory):
            return f"{take.subject}, {others}, has the best quality"
        if take.pays:
            return f"Take {take.noun}, {others}"
        return f"Pruning does not pay here: {take.noun}, {others}, {self._why_not(take)}"

    @property
    def _is_sized(self) -> bool:
        """Whether the words on the group express how much was removed."""
        return "%" in self.words

    def _why_not(self, take: Contender) -> str:
        """Return why a variant does not pay."""
        said = []
        if take.ppl and _has_lost(take):
            said.append(
                f"has a perplexity of {rounded(take.ppl.value)} on {self.text} ({_times(take):.2f} "
                "times the dense model's)"
            )
        if take.speed and _is_as_fast(take):
            said.append(f"is {_pace(take.speed)}")
        elif not take.is_faster and take.speed:
            noisy = (take.speed.noise or 0) > NOISY
            said.append("was measured too noisily to call it faster" if noisy else "is not faster")
        if not take.is_smaller and take.memory and not take.is_faster:
            said.append("does not save memory")
        return listed(said)

    @property
    def rest(self) -> str:
        """The other winners, and what to do instead if the group does not pay."""
        take = self.take
        if take is None:
            return ""
        winners = {"quality": self.quality, "speed": self.speed, "memory": self.memory,
                   "tasks": self.tasks}  # fmt: skip
        named: dict[str, list[str]] = {}
        for name, one in winners.items():
            if one:
                named.setdefault(one.id, []).append(name)
        parts = [take.recovery] if take.recovery else []
        same = [name for name in named.pop(take.id, []) if name != "tasks"]
        if len(same) > 1 and len(self.group) > 1:
            parts.append(f"It wins by {listed(same)}.")
        for variant, names in named.items():
            one = self.of(variant)
            assert one
            facts = self.facts(one, sized=not self._is_sized)
            parts.append(f"By {listed(names)} the best is {one.noun}: {facts}.")
        noisy = [c for c in self.group if c.speed and (c.speed.noise or 0.0) > NOISY]
        if noisy and not self.speed:
            parts.append(
                "Speed was measured too noisily to rank it: benchmark again while nothing else is "
                "running."
            )
        if take.ppl and not take.pays and (take.speed or take.memory):
            other = self.option
            parts.append(
                f"The best option is {other.noun}: {self.facts(other)}."
                if other and other.id != take.id
                else "No variant of this study pays yet: keep the dense model, remove less, or "
                "retrain."
            )
        return " ".join(parts)

    def facts(self, one: Contender, *, sized: bool = True) -> str:
        """Return a variant's figures beside the dense model's, with its size if ``sized``."""
        said = [f"{percent(one.ratio)} of the parameters removed"] if one.ratio and sized else []
        if one.ppl:
            times = f", {one.ppl.times:.2f} times dense" if one.ppl.times else ""
            said.append(f"perplexity {rounded(one.ppl.value)} on {self.text}{times}")
        if one.answers:
            said.append(f"answers {answers.in_words(one.answers)}")
        if one.written:
            said.append(f"writes the answer to {answers.in_words(one.written)}")
        if one.speed:
            said.append(_pace(one.speed))
        if one.memory and one.memory.times:
            said.append(_share(one.memory))
        return "; ".join(said) or UNMEASURED


def _has_lost(one: Contender) -> bool:
    """Whether too much of the quality is gone for a variant to pay."""
    return one.ppl is not None and _times(one) >= LARGE


def _is_as_fast(one: Contender) -> bool:
    """Whether a variant and the dense model are equally fast, as far as was measured."""
    return one.speed is not None and not one.is_faster and _pace(one.speed).startswith(AS_FAST)


def _pace(speed: Figure) -> str:
    if speed.how == "estimated" and (speed.noise or 0.0) > NOISY:
        return f"speed unclear (measured of its size with a noise of {speed.noise:.0%})"
    if abs(speed.value - 1) < 0.005 and speed.how == "estimated":
        return f"{AS_FAST} (estimated)"
    if speed.how == "estimated":
        return f"about {speed.value:.2f} times as fast (estimated)"
    noise = speed.noise or 0.0
    if noise > NOISY:
        return f"{speed.value:.2f} times as fast, but with a noise of {noise:.0%}"
    if abs(speed.value - 1) <= noise:
        return f"{AS_FAST} (the difference is within the noise of {noise:.0%})"
    return f"{speed.value:.2f} times as fast" + (f" (noise {noise:.0%})" if noise >= SEEN else "")


def _share(memory: Figure) -> str:
    guess = ", estimated" if memory.how == "estimated" else ""
    return f"{memory.times or 0:.0%} of the memory ({size(memory.value * MIB)}{guess})"


def text_of(protocol: Protocol) -> str:
    """Return what a perplexity was measured on, in a word or two."""
    name = short(protocol.source)
    return {"held-out": f"held-out rows of {name}", "rows": f"calibration rows of {name}"}.get(
        protocol.bos, name
    )


# ------------------------------------------------------------------------------------- what to use


def ranked(study: Study, evaluation: str) -> list[Protocol]:
    """Return the ways perplexity was measured, the one to decide by first.

    One by which the dense model and a variant can be compared comes before the others; then the
    study's ``evaluation`` text before other evaluated text, calibration rows and held-out rows of
    the training data; then the one with most checkpoints.
    """
    measured: dict[Protocol, set[str]] = {}
    for row in study.quality:
        measured.setdefault(row.protocol, set()).add(row.variant)

    def rank(protocol: Protocol) -> tuple[bool, int]:
        names = measured[protocol]
        compares = study.dense.id in names and len(names) > 1
        tiers = {"rows": 2, "held-out": 3}
        own = protocol.source == evaluation or same_text(protocol.source, evaluation)
        return not compares, tiers.get(protocol.bos, 0 if own else 1)

    return sorted(study.protocols, key=rank)


def protocol_of(study: Study, evaluation: str) -> Protocol | None:
    """Return the way of measuring perplexity to decide by; None if none was measured."""
    return next(iter(ranked(study, evaluation)), None)


def cell_of(scene: Scene) -> Cell:
    """Return the point of the grid to report: one prompt at a time, measured for most variants.

    The longest answer, if several points are.
    """
    dense = {r.cell for r in scene.rows if r.id == scene.study.dense.id and not r.oom}
    at = dense or set(scene.cells)
    batch = min(b for b, _, _ in at)
    counts = {c: sum(r.cell == c and not r.oom for r in scene.rows) for c in at if c[0] == batch}
    return max(counts, key=lambda c: (counts[c], c[2]))


def whole_scene(study: Study, settings: Settings, rates: Rates | None = None) -> Scene:
    """Return the scene that the verdict is on: the protocol to decide by, comparable benchmarks."""
    protocol = protocol_of(study, settings.evaluation)
    return scene(study, protocol, comparable(study.benchmarks), rates)


# -------------------------------------------------------------------------------------- the verdict


def verdict_of(
    study: Study,
    settings: Settings,
    *,
    rates: Rates | None = None,
    budget: choice.Budget | None = None,
    seen: Scene | None = None,
) -> Verdict:
    """Return the verdict on a study.

    Args:
        study: A dense checkpoint and what was made from it.
        settings: The study's: evaluation text, tasks and targets.
        rates: Of the device, for estimates if no benchmark has any.
        budget: Limits instead of the settings' ones.
        seen: The scene to decide on, if it is already known. Default: `whole_scene`.
    """
    budget = budget or choice.Budget(settings.memory_gib, settings.ms_per_token)
    return _decided(study, settings, budget, seen or whole_scene(study, settings, rates))


@kept
def _decided(study: Study, settings: Settings, budget: choice.Budget, seen: Scene) -> Verdict:
    cell = cell_of(seen)
    found = contenders(seen, cell, settings.tasks)
    group, words, missed = _group(found, settings.ratio, budget)
    summary = seen.runs[0].summary if seen.runs else None
    made = Verdict(
        study,
        settings,
        seen.protocol,
        cell,
        f"{summary.device} ({summary.device_name})" if summary else "",
        tuple(found), tuple(group), words, missed,
    )  # fmt: skip
    return replace(
        made,
        quality=min((c for c in group if c.ppl), key=_by_quality, default=None),
        speed=_least(group, "speed"),
        memory=_least(group, "memory"),
        tasks=_most_right(group),
    )


def contenders(seen: Scene, cell: Cell, tasks: Sequence[str] = ()) -> list[Contender]:
    """Return every candidate with its figures at one point of the grid, dense first."""
    rows = seen.table(cell, estimates=True)
    dense = next(r for r in rows if r.candidate.kind == "dense" and not r.candidate.quantized)
    speeds = _speeds(seen, cell)
    # what is estimated from a variant of the same size is as noisy as what was measured of that
    noise: dict[int | None, float] = {}
    for row in rows:
        if pace := speeds.get(row.candidate.label):
            noise[row.parameters] = max(pace.noise, noise.get(row.parameters, 0.0))
    ordered = [dense, *(r for r in rows if r is not dense and r.candidate.kind != "other")]
    return [_contender(seen, row, dense, speeds, noise, tasks) for row in ordered]


def _contender(
    seen: Scene,
    row: Outcome,
    dense: Outcome,
    speeds: Mapping[str, Speed],
    noise: Mapping[int | None, float],
    tasks: Sequence[str],
) -> Contender:
    own = row.candidate
    how = row.kind_of_cost
    ppl = Figure(own.ppl, dense.ppl) if own.ppl else None
    known = how in ("measured", "estimated")
    pace = speeds.get(own.label) if how == "measured" else None
    factor = pace.factor if pace else row.speedup
    unsure = pace.noise if pace else noise.get(row.parameters) if how == "estimated" else None
    speed = Figure(factor, 1.0, how, unsure) if known and factor else None
    memory = None
    if known and row.memory_mib and (dense.kind_of_cost == "measured" or how == "estimated"):
        memory = Figure(row.memory_mib, dense.memory_mib, how)
    said = () if own.is_plan else answers.answers_of(seen.study, own.id, tasks)
    return Contender(
        own,
        ppl,
        answers.chosen(said),
        answers.written(said),
        speed,
        memory,
        row.per_token_ms if known else None,
        _shares(seen, own, ppl),
    )


def _shares(seen: Scene, own: Candidate, ppl: Figure | None) -> tuple[Share, ...]:
    """Return what retraining brought back: on held-out rows, and on the scene's text.

    On the text both measures are those of the retraining, on the same rows, if it measured them;
    otherwise the share by loss follows from the perplexities.
    """
    found = seen.study.shares.get(own.id, ())
    held = tuple(one for one in found if one.is_held_out)
    protocol = seen.protocol
    if not own.retrained or protocol is None or protocol.bos in ("held-out", "rows"):
        return held
    name = protocol.source
    text = [s for s in found if not s.is_held_out]
    text = [s for s in text if s.source == name or same_text(s.source, name)]
    before = next((c.ppl for c in seen.found if c.id == own.parent), None)
    if not text and ppl and ppl.dense and before:
        share = between(name, math.log(ppl.dense), math.log(before), math.log(ppl.value))
        text = [share] if share else []
    return (*held, *text[:1])


def _speeds(seen: Scene, cell: Cell) -> dict[str, Speed]:
    """Return by label the newest speed-up within one benchmark, with its noise."""
    found: dict[str, Speed] = {}
    for bench in sorted(seen.runs, key=lambda b: b.record.started):
        found |= speeds_at(seen.study, bench, cell)
    return found


def _group(
    found: Sequence[Contender], ratio: float | None, budget: choice.Budget
) -> tuple[list[Contender], str, bool]:
    """Return the variants to choose from, what they have in common, and whether targets failed."""
    made = [c for c in found[1:] if c.candidate.is_made]
    written = [c for c in made if not c.candidate.is_plan]
    made = written or made
    if budget.is_set:
        fitting = [c for c in made if _within(c, budget) and c.ratio >= (ratio or 0) - TARGET_NEAR]
        # what has the size of a measured one costs what that does; other estimates are kept apart
        sizes = {c.candidate.parameters for c in made if _is_costed(c)}
        measured = [c for c in fitting if c.candidate.parameters in sizes]
        limited = budget.memory_gib is not None or budget.per_token_ms is not None
        if fitting:
            return measured or fitting if limited else fitting, "within the targets", False
        return _closest(made, ratio), "near the targets", bool(made)
    group = _closest(made, ratio)
    if not group:
        return [], "", False
    middle = statistics.median(c.ratio for c in group)
    missed = ratio is not None and all(abs(c.ratio - ratio) > TARGET_NEAR for c in group)
    return group, f"with about {percent(middle)} of the parameters removed", missed


def _closest(made: Sequence[Contender], ratio: float | None) -> list[Contender]:
    """Return the variants of the size nearest to ``ratio``, else of the size that most have."""
    if not made:
        return []
    sizes = {c.ratio for c in made if c.ratio} or {c.ratio for c in made}

    def near(center: float) -> list[Contender]:
        return [c for c in made if abs(c.ratio - center) <= NEAR]

    def worth(center: float) -> tuple[float, ...]:
        # a size counts by its variants whose quality and cost are measured, then whose quality is
        here = near(center)
        known = [c for c in here if c.ppl]
        counts = (sum(_is_timed(c) for c in known), len(known), len(here))
        away = abs(center - (USUAL if ratio is None else ratio))
        return (*(-n for n in counts), away) if ratio is None else (away, *(-n for n in counts))

    return near(min(sizes, key=worth))


def _is_timed(one: Contender) -> bool:
    return one.speed is not None and one.speed.how == "measured"


def _is_costed(one: Contender) -> bool:
    return any(f is not None and f.how == "measured" for f in (one.speed, one.memory))


def _within(one: Contender, budget: choice.Budget) -> bool:
    times = one.ppl.times if one.ppl else None
    figures = {
        "memory_mib": one.memory.value if one.memory else None,
        "per_token_ms": one.per_token_ms,
        "ppl_over_dense": times,
    }
    return all(
        most is None or (figures[name] or math.inf) <= most * (1 + choice.TIE)
        for name, most in budget.limits.items()
    )


def _times(one: Contender) -> float:
    return (one.ppl.times if one.ppl else None) or math.inf


def _by_quality(one: Contender) -> tuple[float, ...]:
    """Sort by perplexity, then by time and memory."""
    ppl = one.ppl.value if one.ppl else math.inf
    pace = one.speed.value if one.speed else 0.0
    return ppl, -pace, one.memory.value if one.memory else math.inf


def _least(group: Iterable[Contender], name: str) -> Contender | None:
    """Return the winner by ``speed`` or ``memory``; of equally good ones, the best by quality.

    Equal is what differs by no more than the noise. Estimates only count if nothing is measured,
    and what was measured too noisily does not count.
    """
    known = [(c, figure) for c in group if (figure := getattr(c, name))]
    known = [p for p in known if p[1].how == "measured"] or known
    known = [p for p in known if (p[1].noise or 0.0) <= NOISY]
    if not known:
        return None
    sign = -1 if name == "speed" else 1
    top = min((f for _, f in known), key=lambda f: sign * f.value)

    def ties(other: Figure) -> bool:
        noise = math.hypot(top.noise or 0.0, other.noise or 0.0) or ALIKE
        return abs(other.value / top.value - 1) <= noise

    return min((c for c, f in known if ties(f)), key=_by_quality)


def _most_right(group: Iterable[Contender]) -> Contender | None:
    """Return the variant with most right answers, among those asked most tasks.

    Of those within two standard errors of the best, the best by quality.
    """
    asked = [c for c in group if c.answers]
    most = max((len(c.answers) for c in asked), default=0)
    full = [c for c in asked if len(c.answers) == most]
    if not full:
        return None
    top = max(c.accuracy or 0.0 for c in full)
    count = sum(a.count for a in full[0].answers)
    error = math.sqrt(2 * top * (1 - top) / count)
    return min((c for c in full if top - (c.accuracy or 0.0) <= 2 * error), key=_by_quality)
