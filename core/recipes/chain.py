"""Types of a recipe, and the code that runs its steps in order.

Every step is a command of the command line, run in its own process in ``OUT/STEP``, so that it can
be inspected, repeated and built upon like any other run::

    def steps(spec: RecipeSpec) -> list[Step]:
        return [
            Step("scores", "importance", {"checkpoint": spec.checkpoint, "metrics": ("ppl",)}),
            Step("plan", "plan", lambda chain: {"scores": chain.dir("scores"), "count": 2,
                                                "criterion": "ppl"}),
            Step("pruned", "prune", lambda chain: {"checkpoint": chain.spec.checkpoint,
                                                   "plan": chain.file("plan", "plan.json")}),
        ]

    def verdict(chain: Chain) -> Verdict:
        found = chain.read("scores", Importance)
        return Verdict(f"...", figures={"dense_ppl": found.dense_ppl})

    RECIPE = Recipe("drop-two", "Drop two blocks", "What it does, in a sentence.", steps, verdict)

A step that has finished with the same options is not run again, so a recipe that was cancelled,
failed or was killed continues at that step; a command that can resume (retrain) does so. A step
with an instant command (plan) writes its output to ``OUT/STEP/STEP.json``. Steps in a row with the
same ``group`` do not need one another: at a cluster they are one job array, after which the recipe
continues with what they left. Options on the recipe's own command line (device, dtype, seed, join)
are passed to every step that has them, unless the step overrides them. No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from core import commands
from core.errors import Cancelled, HandedOver, RunError
from core.prune.results import PlanFile
from core.recipes.spec import RecipeSpec
from core.runs import devices, elements, jobs, warm, workspace
from core.runs import status as statuses
from core.runs.progress import Progress
from core.runs.results import CsvRow, JsonResult, from_dict
from core.runs.spec import DeviceOptions, RunSpec, build, hints_of, to_arguments, to_dict
from core.runs.warm import Template
from core.runs.workspace import RunRecord, read_run

POLL_S = 0.2
SHARE = 100
"""Progress units of one step."""
PASSED_ON = ("device", "dtype", "seed", "join")
"""Options of the recipe that are passed to every step whose command has them."""

Values = Mapping[str, Any]
Result = TypeVar("Result", bound=JsonResult)
TableRow = TypeVar("TableRow", bound=CsvRow)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of a recipe; ``values`` are its options without ``out``."""

    name: str
    """Subfolder of the recipe's folder, and the name that later steps use."""
    command: str
    values: Values | Callable[[Chain], Values]
    optional: bool = False
    """If this step fails, the recipe continues and the verdict reports the failure."""
    needs: str = ""
    """Name of an optional step that this one depends on: if it failed, this one is skipped."""
    leaves: str = ""
    """File that it must leave in its folder; a finished step without it is carried out again."""
    group: str = ""
    """Steps in a row with the same group do not need one another: at a cluster, a job array."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of a recipe: sentences for people, figures for programs and pages."""

    sentence: str
    findings: tuple[str, ...] = ()
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Expected:
    """The estimated seconds of every step by name, and where the rates are from."""

    seconds: Mapping[str, float]
    origin: str

    @property
    def total(self) -> float:
        """Of all steps together."""
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A chain of steps and the verdict at its end."""

    name: str
    title: str
    about: str
    steps: Callable[[RecipeSpec], list[Step]]
    verdict: Callable[[Chain], Verdict]
    check: Callable[[RecipeSpec], None] | None = None
    """Raises an error for options that it cannot use, before any step starts."""
    expected: Callable[[RecipeSpec], Expected | None] | None = None
    """Returns what its steps take; it is asked again before every step."""


class Chain:
    """The steps of one recipe in one folder."""

    def __init__(
        self,
        spec: RecipeSpec,
        folder: Path,
        progress: Progress,
        expected: Callable[[RecipeSpec], Expected | None] | None = None,
    ) -> None:
        """Bind ``spec`` to ``folder``; ``progress`` reports on all steps together.

        ``expected``: the recipe's, for the time left.
        """
        self.spec = spec
        self.folder = folder
        self.progress = progress
        self.failed: dict[str, str] = {}
        """Optional steps that failed -> reason."""
        self.skipped: set[str] = set()
        """Steps that were skipped because a step they need failed or was skipped itself."""
        self._expected = expected
        self._weights: Mapping[str, float] = {}
        """What share of the whole every step is, in any unit: as was expected at first."""
        self._left: Mapping[str, float] = {}
        """The seconds that every step is expected to take, by the newest rates."""
        self._until_done = contextlib.ExitStack()
        self._templates: list[Template | None] = []
        """What the steps are forked from: empty before the first one, None if they cannot be."""

    def dir(self, step: str) -> Path:
        """Return the folder of a step's results."""
        return self.folder / step

    def file(self, step: str, name: str) -> str:
        """Return the path of a step's file, for the options of a later step."""
        return str(self.folder / step / name)

    def read(self, step: str, kind: type[Result]) -> Result:
        """Return a step's result file; raises `RunError` if it is missing or unreadable."""
        found = kind.read(self.dir(step))
        if found is None:
            raise self._missing(step, kind.FILE)
        return found

    def table(self, step: str, kind: type[TableRow]) -> tuple[TableRow, ...]:
        """Return the rows of a step's table; raises `RunError` if it is missing."""
        if not (self.dir(step) / kind.FILE).is_file():
            raise self._missing(step, kind.FILE)
        return kind.read(self.dir(step))

    def plan(self, step: str) -> PlanFile:
        """Return what a plan step printed; raises `RunError` if it is missing."""
        printed = workspace.read_json(self.dir(step) / f"{step}.json")
        found = from_dict(PlanFile, printed) if printed else None
        if found is None:
            raise self._missing(step, f"{step}.json")
        return found

    def _missing(self, step: str, name: str) -> RunError:
        return RunError(f"Step {step} did not write {name}.", "Run the recipe again.")

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON result of the recipe itself."""
        workspace.write_json(self.folder / name, value)

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV result of the recipe itself."""
        workspace.write_csv(self.folder / name, columns, rows)

    def seconds(self, step: str) -> float:
        """Return the seconds a step took, including start-up."""
        record = read_run(self.folder / step)
        return record.seconds if record else 0.0

    def run(self, steps: list[Step]) -> None:
        """Carry out ``steps``; raises the failure of the first required step that fails."""
        try:
            with self._until_done:
                self._run_steps(steps)
        finally:
            self._templates.clear()

    def _run_steps(self, steps: list[Step]) -> None:
        for place, step in enumerate(steps):
            if step.group and elements.wanted():
                self._hand_over(steps, place)
            self._expect()
            self._report(steps, place, 0.0, step.name, None)
            if step.needs and (step.needs in self.failed or step.needs in self.skipped):
                self.skipped.add(step.name)
                self.progress.log(f"{step.name}: skipped: requires {step.needs}.")
                continue
            try:
                self._run_step(steps, place)
            except RunError as error:
                if not step.optional:
                    raise
                self.failed[step.name] = error.message
                self.progress.log(error.message)
        self.progress.step(len(steps) * SHARE, len(steps) * SHARE, "done")

    def _hand_over(self, steps: Sequence[Step], place: int) -> None:
        """Hand the steps of a group that begins at ``place`` over; raises `HandedOver`.

        Returns if there are not two left to do, or if they were handed over and have ended.
        """
        group = steps[place].group
        if place and steps[place - 1].group == group:
            return
        rest = itertools.takewhile(lambda step: step.group == group, steps[place:])
        made = []
        for step in rest:
            if {step.needs} & ({*self.failed} | self.skipped):
                continue
            with contextlib.suppress(RunError):  # it is raised again when the step has its turn
                entry, spec = self._prepared(step)
                record = read_run(self.dir(step.name))
                if not self._is_done(step, record, spec):
                    spec = _resuming(entry, spec, record)
                    words, values = tuple(to_arguments(spec)), to_dict(spec)
                    made.append(elements.Element(step.name, entry.name, words, values))
        if elements.ended(self._book, [element.name for element in made]):
            return
        if len(made) > 1:
            elements.Elements(tuple(made)).write(self._book)
            raise HandedOver(f"{len(made)} independent steps become one job array.")

    @property
    def _book(self) -> Path:
        return self.folder / workspace.BOOKKEEPING

    def _expect(self) -> None:
        """Ask what the steps take; the first answer decides how far the recipe is."""
        found = self._expected(self.spec) if self._expected else None
        self._left = found.seconds if found else {}
        self._weights = self._weights or self._left

    def _report(
        self, steps: Sequence[Step], place: int, share: float, message: str, eta_s: float | None
    ) -> None:
        """Report that of the step at ``place`` this ``share`` is done and ``eta_s`` are left."""
        weights = [self._weights.get(step.name, 0.0) for step in steps]
        whole = sum(weights)
        if not whole:  # steps take very different times: only the last one's rest is the recipe's
            weights, whole = [1.0] * len(steps), float(len(steps))
            left = eta_s if place == len(steps) - 1 else None
        else:
            own = self._left.get(steps[place].name, 0.0)
            here = own * (1 - share) if eta_s is None else eta_s
            left = here + sum(self._left.get(step.name, 0.0) for step in steps[place + 1 :])
        done = sum(weights[:place]) + share * weights[place]
        total = len(steps) * SHARE
        self.progress.step(
            round(total * done / whole),
            total,
            message,
            left_s=statuses.UNKNOWN_S if left is None else left,
        )

    def _prepared(self, step: Step) -> tuple[commands.Command, RunSpec]:
        """Return the command of a step, and its options."""
        entry = commands.get(step.command)
        values = dict(step.values(self) if callable(step.values) else step.values)
        known = hints_of(entry.spec_class)
        for name in () if entry.is_light(values) else PASSED_ON:
            if name in known and getattr(self.spec, name, None) is not None:
                values.setdefault(name, getattr(self.spec, name))
        if entry.is_run:
            values["out"] = self.dir(step.name)
        values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
        return entry, build(entry.spec_class, values)

    def _is_done(self, step: Step, record: RunRecord | None, spec: RunSpec) -> bool:
        """Whether a step has finished with these options, and left what it must."""
        whole = not step.leaves or (self.dir(step.name) / step.leaves).is_file()
        same = record is not None and _alike(record.spec, spec)
        return record is not None and record.state == "done" and same and whole

    def _run_step(self, steps: Sequence[Step], place: int) -> None:
        step = steps[place]
        entry, spec = self._prepared(step)
        if not entry.is_run:
            result = entry.load().run(spec)
            workspace.write_json(self.dir(step.name) / f"{step.name}.json", result)
            return
        record = read_run(self.dir(step.name))
        same = record is not None and _alike(record.spec, spec)
        if self._is_done(step, record, spec):
            self.progress.log(f"{step.name}: already done.")
            return
        if record and same and step.group and elements.ended(self._book, [step.name]):
            raise RunError(f"Step {step.name} {record.state}: {record.error}", record.hint)
        spec = _resuming(entry, spec, record)
        found = record if record and record.is_live and same else None
        if found:
            self.progress.log(f"{step.name}: resuming the run found in progress.")
            found = self._watch(steps, place, found)
        if found is None or found.state == "lost":  # killed with its launcher, or before it
            self.progress.check_cancel()
            try:
                launcher = self._launcher(step.command, spec)
                record = jobs.launch_in(self.dir(step.name), step.command, spec, launcher)
                self.progress.log(f"{step.name}: {jobs.command_line(step.command, spec)}")
            except BaseException:  # a second signal
                self._stop(step)
                raise
            found = self._watch(steps, place, record)
        if found.state == "cancelled":
            raise Cancelled(f"Step {step.name} was cancelled.", "Run the recipe again to continue.")
        if found.state != "done":
            raise RunError(f"Step {step.name} {found.state}: {found.error}", found.hint)
        if step.leaves and not (self.dir(step.name) / step.leaves).is_file():
            raise RunError(
                f"Step {step.name} finished without {step.leaves}.",
                "Its log says why. Run the recipe again to continue there.",
            )

    def _launcher(self, command: str, spec: RunSpec) -> jobs.LocalLauncher:
        """Return what starts a step; the first one that computes on the CPU makes the template."""
        root = workspace.Workspace().root
        light = commands.get(command).is_light(to_dict(spec))
        if light or not isinstance(spec, DeviceOptions) or devices.resolve(spec.device) != "cpu":
            return jobs.LocalLauncher(root=root)
        if not self._templates:
            made = warm.template("cpu", self.progress.check_cancel)
            self._templates.append(self._until_done.enter_context(made))
        return jobs.LocalLauncher(root=root, template=self._templates[0])

    def _watch(self, steps: Sequence[Step], place: int, record: RunRecord) -> RunRecord:
        """Follow a step until it ends; return its last record. Cancelling the recipe cancels it."""
        step = steps[place]
        try:
            while record.is_live:
                done, total, message = record.progress
                share = min(1.0, done / total) if total else 0.0
                waits = f"waiting for {record.device}, behind {record.waiting_for}"
                text = waits if record.state == "queued" else message or "starting"
                self._report(steps, place, share, f"{step.name}: {text}", record.eta_s)
                time.sleep(POLL_S)
                record = read_run(record.path) or record
        except BaseException:  # cancelled, a signal, or a disk that takes no more of our records
            self._stop(step)
            raise
        return record

    def _stop(self, step: Step) -> None:
        """Stop the process of a step, if there is one; a further signal kills it at once."""
        record = read_run(self.dir(step.name))
        if record is None or not record.is_live:
            return
        try:
            jobs.cancel(record)
        except BaseException:
            jobs.cancel(record, grace_s=0)
            raise


def _resuming(entry: commands.Command, spec: RunSpec, record: RunRecord | None) -> RunSpec:
    """Return the options that continue an earlier attempt, if there is one and it can be."""
    same = record is not None and _alike(record.spec, spec)
    able = same and "resume" in hints_of(entry.spec_class)
    return build(entry.spec_class, {**vars(spec), "resume": True}) if able else spec


def _alike(before: Mapping[str, Any], spec: RunSpec) -> bool:
    """Whether the options of an earlier run mean the same result: resuming it changes nothing.

    Options that it does not name are newer than the run, which had what is now their default.
    """
    own = {f.name: f.default for f in dataclasses.fields(spec)}
    usual = {k: v for k, v in own.items() if v is not dataclasses.MISSING}
    usual = json.loads(json.dumps(usual))  # as a record has them
    return {**usual, **before, "resume": False} == {**to_dict(spec), "resume": False}
