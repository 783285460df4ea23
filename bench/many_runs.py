"""A workspace of many runs, made without computing: ``python -m bench.many_runs FOLDER``.

The runs are of the demo, as commands leave them: cuts, retrainings, evaluations, scores, curves,
benchmarks and recipes, some failed, cancelled or lost, and a few that look live as long as the
process that made them. Weights are links to a few checkpoints, so that 1,000 runs take little disk
space; every figure in them is invented.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.benchmark import results as benchmark
from core.benchmark.analytic import Rates
from core.checkpoint import locate
from core.demo import CHECKPOINT
from core.evaluate import known
from core.evaluate import results as evaluate
from core.prune import depth
from core.prune.results import Pruning
from core.prune.score_results import BlockRow, Curve, CurveRow, Importance, plan_key
from core.recipes.results import RecipeSummary
from core.retrain import results as retrain
from core.runs import processes, workspace
from core.width.results import WidthPruning

CYCLE = (
    *("prune", "evaluate", "prune", "retrain", "prune", "importance", "evaluate", "prune"),
    *("benchmark", "prune", "width", "evaluate", "prune", "curve", "retrain", "prune"),
    *("evaluate", "recipe", "benchmark", "importance"),
)
"""Commands of the runs, repeated; their shares are those of a workspace in use."""
ENDINGS = {7: "failed", 23: "cancelled", 38: "lost"}
"""Ending of every 50th run that has this remainder; the others are done."""
DROPS = tuple(tuple(range(first, first + count)) for count in (1, 2, 3, 4) for first in (4, 6))
"""Blocks of the cuts."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """Writes result files into a run directory; stands in for a `core.runs.run.Run`."""

    dir: Path

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file."""
        workspace.write_json(self.dir / name, value, durable=False)

    def write_csv(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Write a CSV file."""
        workspace.write_csv(self.dir / name, columns, rows)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        workspace.write_text(self.dir / name, text, durable=False)


@dataclasses.dataclass
class Maker:
    """Makes one run after another; ``weights`` gives the cuts checkpoints that can be read."""

    root: Path
    weights: bool = True
    chance: random.Random = dataclasses.field(default_factory=lambda: random.Random(1))
    cuts: list[Path] = dataclasses.field(default_factory=list)
    scored: str = ""

    def make(self, number: int, command: str, state: str, created: float) -> Path:
        """Make one run; only one that is done gets results."""
        folder = self.root / f"{command}-{number:05d}"
        (folder / ".run").mkdir(parents=True)
        spec = {"checkpoint": "demo"}
        if command in ("retrain", "evaluate", "benchmark") and self.cuts and number % 5:
            spec["checkpoint"] = str(self.chance.choice(self.cuts[-60:]))
        if state == "done":
            spec |= getattr(self, f"_{command}")(folder, number, spec["checkpoint"])
        self._book(folder, command, spec, state, created)
        return folder

    def _book(
        self, folder: Path, command: str, spec: dict[str, Any], state: str, created: float
    ) -> None:
        if command == "benchmark":
            spec.setdefault("checkpoints", [spec.pop("checkpoint")])
        argv = ["python", "-m", "core", command, str(spec.get("checkpoint")), "--out", str(folder)]
        value = {"command": command, "spec": {**spec, "out": str(folder)}, "argv": argv}
        Folder(folder / ".run").write_json("spec.json", value)
        owner: dict[str, Any] = {"pid": 2**22 + 1, "pid_started": 1.0}
        if state in workspace.LIVE_STATES:
            owner = processes.identity()
        stored = "running" if state == "lost" else state
        status = {"state": stored, "created": created, "host": socket.gethostname(), **owner}
        status |= {"progress": {"done": 3, "total": 8, "message": "blocks"}, "device": "cpu"}
        if state in workspace.FINAL_STATES:
            status["finished"] = created + self.chance.uniform(1, 90)
        if state == "failed":
            status |= {"error": "Too little text.", "hint": "Give more."}
        Folder(folder / ".run").write_json("status.json", status)
        lines = [f"10:00:{second:02d} {command}: line {second}" for second in range(20)]
        (folder / ".run" / "log.txt").write_text("\n".join(lines) + "\n")
        (folder / ".run" / "heartbeat").touch()

    def _prune(self, folder: Path, number: int, _: str) -> dict[str, Any]:
        drop = DROPS[number % len(DROPS)]
        self._checkpoint(folder, number, drop)
        found = Pruning.read(folder) or Pruning()
        plan = {"drop": list(drop), "criterion": "ppl", "protected": [0, 1, 2, 3, 12, 13]}
        plan |= {"blocks": 14, "protect_first": 4, "protect_last": 2}
        by_plan = dataclasses.replace(found, criterion="ppl", plan=plan)
        (by_plan if number % 3 else found).write(Folder(folder))
        self.cuts.append(folder)
        return {"drop": list(drop)}

    def _width(self, folder: Path, number: int, _: str) -> dict[str, Any]:
        drop = DROPS[number % len(DROPS)]
        self._checkpoint(folder, number, drop)
        cut = Pruning.read(folder) or Pruning()
        left = cut.parameters_after or 0
        made = WidthPruning(
            method="flap", source="demo", base_model="demo", source_key=cut.source_key,
            original_blocks=tuple(range(14)), blocks_before=14, blocks_after=14,
            parameters_before=cut.parameters_before, parameters_after=left, ratio=cut.ratio,
            layers=tuple(range(4, 12)),
        )  # fmt: skip
        made.write(Folder(folder))
        self.cuts.append(folder)
        return {"method": "flap", "ratio": cut.ratio}

    def _checkpoint(self, folder: Path, number: int, drop: tuple[int, ...]) -> None:
        """Fill ``folder`` with a cut; its config names the run, so no two are equal."""
        seed = _seed(self.root, drop, self.weights)
        for file in seed.iterdir():
            if file.name == "model.safetensors":
                os.link(file, folder / file.name)
            elif file.is_file():
                shutil.copyfile(file, folder / file.name)
        config = json.loads((seed / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "made_by_run": number}))

    def _retrain(self, folder: Path, number: int, source: str) -> dict[str, Any]:
        before, dense = 1.4 + 0.01 * (number % 7), 0.63
        after = dense + (before - dense) * self.chance.uniform(0.2, 0.7)
        method = ("lora", "continued", "full")[number % 3]
        retrain.Summary(
            state="done", method=method, checkpoint=source, dense="demo",
            heldout_loss_dense=dense, heldout_loss_before=before, heldout_loss_after=after,
            heldout_ppl_dense=1.88, heldout_ppl_before=4.1, heldout_ppl_after=2.0 + after,
            gap_nat=before - dense, recovered=(before - after) / (before - dense), steps=60,
            tokens=61440, tokens_per_s=2100.0, seconds=33.0, device="cpu", dtype="float32",
            compute_dtype="float32", seed=1, trainable_parameters=68000, peak_memory_mib=311.0,
            data=retrain.Data(source="demo", kind="text", rows=480),
            heldout=retrain.Heldout(source="demo", rows=32, tokens=3300),
        ).write(Folder(folder))  # fmt: skip
        lines = []
        for step in range(60):
            loss = before - (before - after) * step / 60
            lines.append(json.dumps({"step": step, "loss": loss, "lr": 1e-4, "tokens_per_s": 2000}))
        Folder(folder / ".run").write_text("metrics.jsonl", "\n".join(lines) + "\n")
        return {"method": method, "data": "demo", "seed": 1}

    def _evaluate(self, folder: Path, number: int, source: str) -> dict[str, Any]:
        place = Path(source) if source != "demo" else CHECKPOINT
        content = known.checkpoint_content(place) if self.weights else f"content of {source}"
        key = locate.at(place).info.key if self.weights else ""
        ppl = 1.9 if source == "demo" else self.chance.uniform(1.9, 6.0)
        skills = ("add", "agree", "copy", "count", "recall")
        asked = tuple(
            evaluate.Asked(
                task=f"demo_{skill}", content="demo tasks", limit=100, key=f"{folder.name}-{skill}",
                scores=((f"demo_{skill}", "acc", self.chance.uniform(0.3, 1), 0.04, 100),),
            )
            for skill in skills
        )  # fmt: skip
        text = evaluate.Text(
            source="demo", window=128, bos="once", tokens=12000, ppl=ppl, windows=96,
            content="demo text", key=f"{folder.name}-text",
        )  # fmt: skip
        summary = evaluate.Summary(
            checkpoint=source, checkpoint_key=key, content=content, blocks=14, perplexity=(text,),
            tasks=asked, limit=100, device="cpu", dtype="float32",
        )  # fmt: skip
        run = Folder(folder)
        summary.write(run)
        row = evaluate.TextRow(source="demo", window=128, bos="once", tokens=12000, ppl=ppl)
        evaluate.TextRow.write(run, [row])
        evaluate.Score.write(run, [score for one in asked for score in one.rows])
        windows = [
            evaluate.WindowRow("demo", 128, "once", i, 0.6 + self.chance.random())
            for i in range(96)
        ]
        evaluate.WindowRow.write(run, windows)
        samples = [
            evaluate.Sample(
                task=f"demo_{skill}", index=i, content=f"{skill} {i}", target=0,
                question=f"{skill}, question {i}: which one is it?", choices=("this", "that"),
                loglikelihoods=(-1.5, -2.5), answer=i % 2, metrics={"acc": float(i % 7 > 1)},
            )
            for skill in skills
            for i in range(100)
        ]  # fmt: skip
        evaluate.write_samples(run, samples)  # type: ignore[arg-type]
        return {"perplexity": ["demo"], "tasks": ["demo"], "limit": 100}

    def _importance(self, folder: Path, number: int, _: str) -> dict[str, Any]:
        info = locate.at(CHECKPOINT).info
        Importance(
            checkpoint="demo", checkpoint_key=info.key, family="llama", blocks=14, dense_ppl=1.89,
            metrics=("ppl", "taylor", "magnitude", "block-influence", "relative-update"),
            calibration="demo", samples=10, length=128, seed=number % 4, device="cpu",
            dtype="float32",
        ).write(Folder(folder))  # fmt: skip
        one = self.chance.random
        rows = [BlockRow(b, 1.9 + one(), one(), 10 + one(), one(), one()) for b in range(14)]
        BlockRow.write(Folder(folder), rows)
        self.scored = str(folder)
        return {"samples": 10, "length": 128, "seed": number % 4}

    def _curve(self, folder: Path, number: int, _: str) -> dict[str, Any]:
        info = locate.at(CHECKPOINT).info
        each = info.parameters // 15
        order = self.chance.sample(range(4, 12), 6)
        names = ("ppl", "taylor")
        drops = {plan_key(n, c): tuple(order[:c]) for n in names for c in range(1, 7)}
        Curve(
            checkpoint="demo", checkpoint_key=info.key, scores=self.scored, dense_ppl=1.89,
            protected=(0, 1, 2, 3, 12, 13), drops=drops, calibration="demo", samples=10,
            length=128, seed=number % 4, device="cpu", dtype="float32",
        ).write(Folder(folder))  # fmt: skip
        rows = [
            CurveRow(n, c, c * each / info.parameters, info.parameters - c * each, 1.89 + 0.3 * c)
            for n in names
            for c in range(7)
        ]
        CurveRow.write(Folder(folder), rows)
        return {"scores": self.scored}

    def _benchmark(self, folder: Path, number: int, source: str) -> dict[str, Any]:
        places = {"dense": str(CHECKPOINT), Path(source).name: source}
        if source == "demo":
            places = {"dense": "demo"}
        variants = tuple(
            benchmark.MeasuredVariant(name=n, path=p, parameters=2_222_464, dtype="float32")
            for n, p in places.items()
        )
        rates = Rates(2e10, 8e9, 2e-5)
        summary = benchmark.Summary(
            device="cpu", device_name="CPU", threads=2, input_tokens=12, seed=1, variants=variants,
            order=tuple(places), peak_memory="process growth", rates=rates,
        )  # fmt: skip
        points = [
            benchmark.Point(
                variant=name, batch_size=batch, input_tokens=12, output_tokens=out,
                latency_s_mean=pace, latency_s_std=0.01, latency_s_p50=pace, tokens_per_s=1 / pace,
                per_token_s=pace / out, peak_memory_mib=30.0 + batch, runs=10,
            )
            for place, name in enumerate(places)
            for batch in (1, 4)
            for out in (32, 128)
            for pace in [out * 0.01 * (1 - 0.2 * place)]
        ]  # fmt: skip
        summary.write(Folder(folder))
        benchmark.Point.write(Folder(folder), points)
        return {"checkpoints": list(places.values())}

    def _recipe(self, folder: Path, number: int, _: str) -> dict[str, Any]:
        name = ("drop-one", "importance")[number % 2]
        RecipeSummary(
            recipe=name, title="A recipe", checkpoint="demo", verdict="Block 6 matters least.",
            findings=("It was measured on 10 rows.",),
        ).write(Folder(folder))  # fmt: skip
        for step in ("scores", "cut"):
            below = folder / step
            (below / ".run").mkdir(parents=True)
            self._book(below, "importance", {"checkpoint": "demo"}, "done", time.time() - 9e6)
        return {"name": name}


@functools.lru_cache(maxsize=64)
def _seed(root: Path, drop: tuple[int, ...], weights: bool) -> Path:
    """Return a pruned demo that runs' folders are filled from; its folder is not a run."""
    folder = root / ".seeds" / ",".join(map(str, drop))
    folder.mkdir(parents=True)
    depth.prune(CHECKPOINT, drop, folder, name="demo", overwrite=True)
    if not weights:
        (folder / "model.safetensors").unlink()
    return folder


def fill(root: Path, count: int, *, weights: bool = True, live: int = 3) -> list[Path]:
    """Make ``count`` runs in ``root``, a minute apart; the last ``live`` look live.

    Steps of recipes are counted, too.
    """
    maker, made, steps = Maker(root.absolute(), weights), [], 0
    now = time.time()
    number = 0
    while number + steps < count:
        left = count - number - steps
        command = CYCLE[number % len(CYCLE)]
        if command == "recipe" and left < 3 + live:
            command = "importance"
        state = "running" if left <= live else ENDINGS.get(number % 50, "done")
        made.append(maker.make(number, command, state, now - 60.0 * left))
        steps += 2 if (command, state) == ("recipe", "done") else 0
        number += 1
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    began = time.perf_counter()
    fill(arguments.folder, arguments.runs)
    print(f"{arguments.runs} runs in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
