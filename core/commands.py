"""The registry of commands: name, where its spec and runner live, and what it needs.

Modules are imported when a command is asked for, so that ``inspect`` starts without torch and the
dashboard can read every spec.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from core.errors import OptionError


@dataclass(frozen=True)
class Command:
    """One verb of the command line."""

    name: str
    module: str
    """Module with the spec class and ``run`` (and ``dry_run`` where there is one)."""
    spec_name: str
    help: str
    computes: bool = False
    """Takes the device; others queue."""
    is_run: bool = True
    """Works in a run directory; others print JSON and leave nothing behind."""
    grace_s: float = 20.0
    """How long a cancelled run may take to stop by itself before it is ended."""

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
            "What a checkpoint is, from headers.",
            is_run=False,
        ),
        Command(
            "importance",
            "core.importance.command",
            "ImportanceSpec",
            "Score every block of a checkpoint.",
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
            "prune", "core.prune.prune_command", "PruneSpec", "Write a checkpoint without blocks."
        ),
        Command(
            "curve",
            "core.importance.curve_command",
            "CurveSpec",
            "Perplexity after removing the first k blocks, for several criteria.",
            computes=True,
        ),
        Command(
            "evaluate",
            "core.evaluate.command",
            "EvaluateSpec",
            "Perplexity of texts and accuracy on tasks.",
            computes=True,
        ),
        Command(
            "width",
            "core.width.command",
            "WidthSpec",
            "Write a narrower checkpoint: heads and neurons removed.",
            computes=True,
        ),
        Command(
            "benchmark",
            "core.benchmark.command",
            "BenchmarkSpec",
            "Latency, throughput and memory of checkpoints.",
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
            "live",
            "core.live.command",
            "LiveSpec",
            "Hold models and answer at once for any skipped blocks.",
            computes=True,
        ),
        Command(
            "recipe",
            "core.recipes.command",
            "RecipeSpec",
            "A named chain of runs with one verdict.",
            grace_s=180.0,
        ),
        Command(
            "demo",
            "core.recipes.demo_command",
            "DemoSpec",
            "The short recipes on the bundled checkpoint.",
            grace_s=180.0,
        ),
        Command(
            "report",
            "core.report.command",
            "ReportSpec",
            "A study as one HTML file to hand over, and as a zip.",
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
        raise OptionError(f"No command '{name}'.", f"Commands: {', '.join(COMMANDS)}.")
    return COMMANDS[name]
