"""The registry of commands: each one's name, the module of its spec and runner, and its needs.

Modules are imported on demand, so that ``inspect`` starts without torch and the dashboard can
read every spec.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from core.errors import OptionError


@dataclass(frozen=True)
class Command:
    """One verb of the command line."""

    name: str
    module: str
    """Module with the spec class and ``run`` (and ``dry_run``, if it has one)."""
    spec_name: str
    help: str
    computes: bool = False
    """Holds the device while it runs; other computing runs queue behind it."""
    computes_if: str = ""
    """Option with which a command computes that otherwise needs no device; ``none`` is without."""
    is_run: bool = True
    """Creates a run directory; other commands print JSON and write no files of their own."""
    stays: bool = False
    """Only makes sense on the machine that asks for it."""
    grace_s: float = 20.0
    """How long a cancelled run may take to stop by itself before it is killed."""

    def takes_device(self, options: Mapping[str, Any]) -> bool:
        """Whether a run with these options, by their names, holds the device."""
        return self.computes or (bool(self.computes_if) and not self.is_light(options))

    def is_light(self, options: Mapping[str, Any]) -> bool:
        """Whether `computes_if` is off, so that the options on device and text do nothing."""
        return bool(self.computes_if) and options.get(self.computes_if, "none") == "none"

    @property
    def goes_elsewhere(self) -> bool:
        """Whether its runs can go to another place."""
        return self.is_run and not self.stays

    def load(self) -> ModuleType:
        """Import the command's module."""
        return importlib.import_module(self.module)

    @property
    def spec_class(self) -> type[Any]:
        """The frozen dataclass of the command's options."""
        return getattr(self.load(), self.spec_name)


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "inspect",
            "core.checkpoint.inspect_command",
            "InspectSpec",
            "Describe a checkpoint from its headers.",
            is_run=False,
        ),
        Command(
            "import",
            "core.importing.command",
            "ImportSpec",
            "Make a checkpoint of a GGUF file, or of SmolLM2-135M.",
        ),
        Command(
            "importance",
            "core.importance.command",
            "ImportanceSpec",
            "Score every block of a checkpoint.",
            computes=True,
        ),
        Command(
            "search",
            "core.search.command",
            "SearchSpec",
            "Search for the sets of blocks whose removal costs least.",
            computes=True,
        ),
        Command(
            "budget",
            "core.budget.command",
            "BudgetSpec",
            "Measure what every version of every block costs, for plans within budgets.",
            computes=True,
        ),
        Command(
            "plan",
            "core.prune.plan_command",
            "PlanSpec",
            "Choose the blocks to drop.",
            is_run=False,
        ),
        Command(
            "prune",
            "core.heal.command",
            "PruneSpec",
            "Write a checkpoint without blocks, and heal it if asked to.",
            computes_if="heal",
        ),
        Command(
            "curve",
            "core.importance.curve_command",
            "CurveSpec",
            "Measure perplexity after removing the first k blocks, for several criteria.",
            computes=True,
        ),
        Command(
            "evaluate",
            "core.evaluate.command",
            "EvaluateSpec",
            "Measure perplexity on texts and accuracy on tasks.",
            computes=True,
        ),
        Command(
            "width",
            "core.width.command",
            "WidthSpec",
            "Write a narrower checkpoint, with heads and neurons removed.",
            computes=True,
        ),
        Command(
            "quantize",
            "core.quantize.command",
            "QuantizeSpec",
            "Write an int8 or int4 variant of a checkpoint (weights only).",
        ),
        Command(
            "benchmark",
            "core.benchmark.command",
            "BenchmarkSpec",
            "Measure latency, throughput and memory of checkpoints.",
            computes=True,
        ),
        Command(
            "retrain",
            "core.retrain.command",
            "RetrainSpec",
            "Restore the quality of a pruned checkpoint: LoRA, continued, full.",
            computes=True,
            grace_s=120.0,
        ),
        Command(
            "generate",
            "core.generate.command",
            "GenerateSpec",
            "Let a model write training text: its own answers to prompts.",
            computes=True,
        ),
        Command(
            "export",
            "core.export.command",
            "ExportSpec",
            "Write a checkpoint as GGUF or as a mergekit recipe, or push it to the Hub.",
        ),
        Command(
            "live",
            "core.live.command",
            "LiveSpec",
            "Keep models loaded and answer at once for any set of skipped blocks.",
            computes=True,
            stays=True,
        ),
        Command(
            "recipe",
            "core.recipes.command",
            "RecipeSpec",
            "Run a named chain of runs that ends in one verdict.",
            grace_s=180.0,
        ),
        Command(
            "demo",
            "core.recipes.demo_command",
            "DemoSpec",
            "Run the short recipes on the bundled checkpoint.",
            grace_s=180.0,
        ),
        Command(
            "estimate",
            "core.estimate.command",
            "EstimateSpec",
            "Estimate memory, bytes read and time of every command on a GPU.",
            is_run=False,
        ),
        Command(
            "doctor",
            "core.doctor.command",
            "DoctorSpec",
            "Check that every computing path works on this machine.",
            computes=True,
        ),
        Command(
            "report",
            "core.report.command",
            "ReportSpec",
            "Export a study as one self-contained HTML file, and as a zip.",
            is_run=False,
        ),
        Command(
            "places",
            "core.places.command",
            "PlacesSpec",
            "List the places that runs can go to, and test one.",
            is_run=False,
        ),
        Command(
            "jobs",
            "core.runs.jobs_command",
            "JobsSpec",
            "List, show and cancel runs.",
            is_run=False,
        ),
    )
}


def get(name: str) -> Command:
    """Return a command by name; raises `OptionError` with the known names."""
    if name not in COMMANDS:
        raise OptionError(f"Unknown command '{name}'.", f"Commands: {', '.join(COMMANDS)}.")
    return COMMANDS[name]
