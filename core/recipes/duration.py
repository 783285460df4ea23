"""How long the steps of recipe ``make`` take, estimated from rates measured on this machine.

From headers and texts alone, so that a page can show it before every launch; no torch. While the
recipe runs, its chain asks again before every step: by then earlier steps have measured rates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from core import outside
from core.benchmark.duration import Work
from core.benchmark.protocol import Cell
from core.benchmark.results import known_rates
from core.checkpoint import locate
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.data import sources
from core.errors import DepthcutError
from core.evaluate import estimate as evaluating
from core.evaluate import suites
from core.evaluate.spec import EvaluateSpec
from core.heal import command as healing
from core.heal.command import PruneSpec
from core.importance import command as importance
from core.importance.command import ImportanceSpec
from core.prune.plan import parameters_after
from core.recipes import depth_vs_width, drop_one, retraining, texts
from core.recipes.chain import Expected
from core.recipes.spec import RecipeSpec
from core.retrain import pace as training
from core.retrain.spec import SMALL
from core.runs import devices, pace
from core.runs.workspace import Workspace
from core.width import command as width
from core.width.command import WidthSpec

START_S = evaluating.START_S
HEAL_PASSES = 4
"""Forward passes over the calibration rows that healing costs, roughly."""
BATCHES = {True: 16, False: 64}
"""Rows of a training step of a model below and above `core.retrain.spec.SMALL`."""
LETTERS_A_TOKEN = 4
BUNDLED_ROW = {"demo": 185}
"""Tokens of a row of a bundled text, measured; of others as many as are cut off."""
HELD = 120
"""Rows that a retraining holds out, roughly."""
ROWS = 200
"""Rows of a text that are looked at for their length."""


def of_make(spec: RecipeSpec, removal: Removal, names: Mapping[str, str]) -> Expected | None:
    """Return what the steps take; None if this device's rates are unknown, or an input is missing.

    ``names``: step -> what it does: scores, prune, retrain, width, speed, or evaluate:VARIANT and
    tasks:VARIANT with dense, pruned, retrained or narrower.
    """
    try:
        info = locate.open(spec.checkpoint, need="config", need_tokenizer=False).info
        rate, origin = evaluating.rate(spec.device, info.parameters)
        if not rate or not origin:
            return None
        if removal:
            left = parameters_after(info, removal) / info.parameters
        else:
            left = 1 - (spec.ratio or retraining.QUARTER)
        known = _Known(spec, info, rate, left, removal)
        return Expected({step: known.seconds(what) for step, what in names.items()}, origin)
    except (DepthcutError, OSError):
        return None


@dataclass(frozen=True)
class _Known:
    spec: RecipeSpec
    info: CheckpointInfo
    rate: float
    left: float
    """Share of the parameters that the variant keeps."""
    removal: Removal

    def seconds(self, what: str) -> float:
        kind, _, variant = what.partition(":")
        share = 1.0 if variant == "dense" else self.left
        found: float = getattr(self, f"_{kind}")(share)
        return found

    def _plan(self, _: float) -> float:
        return 0.1

    def _scores(self, _: float) -> float:
        asked = ImportanceSpec(
            checkpoint=self.spec.checkpoint, metrics=("ppl",), calibration=self.spec.calibration,
            device=self.spec.device, dtype=self.spec.dtype, out="",
        )  # fmt: skip
        return START_S + float(importance.dry_run(asked)["seconds"] or 0.0)

    def _prune(self, _: float) -> float:
        weights = self.info.memory_bytes.get(self.info.dtype, 0) * self.left
        copied = pace.CUT_START_S + pace.writing(weights)[0]
        if self.spec.heal == "none":
            return copied
        asked = PruneSpec(
            checkpoint=self.spec.checkpoint, heal=self.spec.heal, device=self.spec.device, out=""
        )
        if self.removal:
            flops = healing.healing_flops(asked, self.info, self.removal)
        else:  # the blocks are not chosen yet
            length = healing.length_of(asked, self.info)
            flops = HEAL_PASSES * evaluating.forward_flops(self.info, healing.SAMPLES, length)
        return START_S + copied + flops / self.rate

    def _retrain(self, _: float) -> float:
        spec, small = self.spec, self.info.parameters < SMALL
        steps = spec.steps or retraining.STEPS
        cutoff = min(256, self.info.context or 256)
        source = texts.data_of(spec).split(",")[0].strip()
        length = min(cutoff, BUNDLED_ROW.get(source, cutoff))
        if spec.retrain != "continued" and (state := sources.stamp(source)):
            length = min(cutoff, _tokens_per_row(source, state))
        parameters = self.left * self.info.parameters
        tokens = steps * BATCHES[small] * length
        speed = training.flops_per_s(spec.retrain, spec.device, round(parameters)) or self.rate
        trained = 2 * parameters * tokens * training.passes(spec.retrain)
        once = 2 * parameters * HELD * length
        during = -(-steps // max(1, steps // 4))
        measured = once * (1 / self.left + 1 + during + (spec.retrain == "lora"))
        written = self.info.memory_bytes.get(self.info.dtype, 0) / pace.COPY_BYTES_PER_S
        return START_S + (trained + measured) / speed + written

    def _width(self, _: float) -> float:
        asked = WidthSpec(
            checkpoint=self.spec.checkpoint, method=self.spec.width, device=self.spec.device,
            dtype=self.spec.dtype, params=round(self.left * self.info.parameters),
            samples=depth_vs_width.SAMPLES, out="",
        )  # fmt: skip
        return START_S + float(width.dry_run(asked)["seconds"] or 0.0) + self._prune(1.0)

    def _evaluation(self, **asked: Any) -> float:
        spec = dataclasses.replace(
            EvaluateSpec(
                checkpoint=self.spec.checkpoint, device=self.spec.device, dtype=self.spec.dtype,
                out="",
            ),
            **asked,
        )  # fmt: skip
        folder = locate.open(spec.checkpoint, need="config", need_tokenizer=False).folder
        tokens = sum(_tokens(source) for source in spec.perplexity)
        flops = evaluating.perplexity_flops(self.info, tokens, spec.window[0])
        found = flops / self.rate
        for task in suites.expand(spec.tasks):
            found += evaluating.task_s(self.info, task, spec, folder, self.rate) or 0.0
        return found

    def _evaluate(self, share: float) -> float:
        pair = texts.given_apart(self.spec)
        source = pair[1] if pair else texts.data_of(self.spec)
        window = (min(128, self.info.context or 128),)
        return START_S + share * self._evaluation(perplexity=(source,), window=window)

    def _tasks(self, share: float) -> float:
        asked = {"tasks": self.spec.tasks, "limit": self.spec.limit, "task_dir": self.spec.task_dir}
        return START_S + share * self._evaluation(**asked)

    def _speed(self, _: float) -> float:
        device = devices.resolve(self.spec.device)
        rates = known_rates(Workspace(), device)
        count = 2 + (self.spec.width != "none")
        tokens = min(drop_one.OUTPUT, (self.info.context or 128) // 2)
        limit = drop_one.CPU_SECONDS / (2 * count) if device == "cpu" else None
        work = Work(
            [("dense", self.info)], [Cell(1, tokens)], rates=rates, input_tokens=12, runs=20,
            warmup=10, visits=2, point_limit_s=limit,
        )  # fmt: skip
        return count * work.total_s


def _tokens(source: str) -> int:
    """Return about how many tokens of a text are evaluated: at most the usual part of it."""
    file = outside.path_of(sources.split_field(source)[0])
    if source in sources.BUNDLED or not outside.is_file(file):
        return evaluating.PART
    return min(evaluating.PART, file.stat().st_size // LETTERS_A_TOKEN)


@functools.lru_cache(maxsize=64)
def _tokens_per_row(source: str, _: str) -> int:
    """Return about how many tokens a row of training data has."""
    rows = [str(row.get("text") or " ".join(map(str, row.values())))
            for row in islice(sources.open_rows(source, "train"), ROWS)]  # fmt: skip
    return max(8, round(sum(map(len, rows)) / max(1, len(rows)) / LETTERS_A_TOKEN))
