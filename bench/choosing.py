"""Ways of choosing what goes, and of healing it, on real text: ``python -m bench.choosing FOLDER``.

For 8, 6 and 4 of SmolLM2's 30 blocks (and for 4, 3 and 2 of the demo's 14): the sets that every way
of choosing takes, each as it is and healed, what a budget of the same latency solves to, and the
width methods at the same size, with the same refit too. Calibration is on C4 rows; perplexity is
measured on texts that chose nothing. Runs of the product and all rows, as JSON, stay in FOLDER:
started again, the script measures only what is missing, the most important rows first. It
writes docs/results/choosing.md after each row; a dash stands for what has not been measured.

    python -m bench.choosing DIR --only choose,quality,least   resumable; --counts 8: these alone
    python -m bench.choosing DIR --only latency          on a quiet machine
    python -m bench.choosing DIR --only tasks --questions 400

The texts and questions come from ../shared/real and are not part of the project.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.smollm2 import REAL, ROOT, TASKS, Proof, score_in, table_row
from core.__main__ import main as command_line
from core.benchmark.generate import Clock
from core.benchmark.results import Point
from core.benchmark.results import Summary as Benchmark
from core.checkpoint import locate
from core.checkpoint.drop import PARTS, Removal
from core.data.calibration import sample
from core.data.evaluation import token_stream, windows_of
from core.evaluate.perplexity import window_losses
from core.evaluate.results import Score
from core.heal.healing import applied, heal
from core.heal.seams import parts_of
from core.importance.branches import Batch, losses_without, make_batch
from core.model import loading
from core.model.blocks import BlockView
from core.prune import budgets
from core.prune.budgets import Limits
from core.prune.score_results import BlockRow
from core.prune.set_results import SetRow
from core.prune.version_results import WHOLE
from core.runs.workspace import read_json, read_run, write_json
from core.search.methods import METHODS
from core.width.results import WidthPruning
from core.words import block_ranges

PAGE = ROOT / "docs" / "results" / "choosing.md"
ONE_SHOT = {"ppl": "PPL+", "taylor": "Taylor+", "block_influence": "Block Influence"}
WIDTH = {"llm-pruner": "LLM-Pruner", "flap": "FLAP", "wanda-sp": "Wanda-sp"}
BASE = "PPL+"
BUDGET = "budget, same latency"
REFIT, MIXED = "refit", "refit, C4 and Wikipedia"
FIRST_ROWS = (
    (BASE, "plain"),
    ("greedy, KL", REFIT),
    (BUDGET, REFIT),
    ("greedy, KL", "plain"),
)
"""The rows that are measured first."""
FIRST, LAST = 4, 2
"""Protected blocks of PPL+ and Taylor+, as in the paper; on the demo the product's defaults."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Model:
    """What is measured on one checkpoint."""

    name: str
    counts: tuple[int, ...]
    """The most important first."""
    protect: tuple[int, int]
    search: tuple[str, ...]
    """Options of the search for sets as they are."""
    healed_search: tuple[str, ...]
    """Options of the search for sets by what they cost after healing."""
    budgets: dict[str, tuple[str, ...]]
    """Label -> options of a budget run; the first is the one that counts."""
    heal_rows: tuple[int, int]
    """Rows and tokens per row that repairs are fitted on, a quarter of them held out."""
    least: int
    """A further cut, of one-shot sets alone, to set beside width models that are as fast."""


SMOLLM2 = Model(
    "SmolLM2-135M-Instruct",
    (8, 6, 4),
    (FIRST, LAST),
    ("--samples", "8", "--length", "64"),
    ("--length", "256"),
    {
        BUDGET: ("--samples", "10", "--length", "128", "--context", "128", "--runs", "3"),
        f"{BUDGET}, chosen on 6 x 64 tokens": (
            "--samples",
            "6",
            "--length",
            "64",
            "--context",
            "128",
            "--runs",
            "3",
        ),
    },
    (64, 256),
    2,
)
DEMO = Model(
    "demo",
    (4, 3, 2),
    (1, 1),
    ("--samples", "10", "--length", "128", "--protect-first", "1", "--protect-last", "1"),
    ("--length", "128", "--protect-first", "1", "--protect-last", "1"),
    {BUDGET: ("--samples", "10", "--length", "128", "--context", "128", "--runs", "3")},
    (64, 128),
    1,
)


@dataclass(frozen=True)
class Text:
    """One text that chose nothing, in windows."""

    name: str
    window: int
    rows: list[list[int]]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.window}"


@dataclass
class Bench(Proof):
    """The folder of one checkpoint: runs of the product, rows of the table."""

    model: Model = SMOLLM2
    calibration: str = ""
    page: Callable[[], None] = lambda: None
    _loaded: BlockView | None = None
    _heal_batches: dict[str, Batch] = field(default_factory=dict)
    _texts: list[Text] = field(default_factory=list)

    def checkpoint(self, name: str) -> Path:
        if name == "dense":
            given = self.args.checkpoint if self.model is SMOLLM2 else "demo"
            return locate.open(given or str(self.at("smollm2"))).folder
        return self.at(name)

    def save(self) -> None:
        self.page()

    @property
    def view(self) -> BlockView:
        """The dense model, in float32."""
        if self._loaded is None:
            self._loaded = BlockView(self.load(self.checkpoint("dense")))
        return self._loaded

    def load(self, folder: Path) -> Any:
        return loading.load_model(folder, torch.device("cpu"), torch.float32)

    @property
    def tokenizer(self) -> Any:
        return loading.load_tokenizer(self.checkpoint("dense"))

    def heal_batch(self, how: str) -> Batch:
        """The rows that repairs are fitted on."""
        source = mixed(self) if how == MIXED else self.calibration
        if source not in self._heal_batches:
            rows, length = self.model.heal_rows
            drawn = sample(source, self.tokenizer, rows, length, 1234)
            self._heal_batches[source] = make_batch(drawn.rows, self.view)
        return self._heal_batches[source]

    @property
    def texts(self) -> list[Text]:
        """Texts that chose nothing."""
        if not self._texts:
            tokenizer = self.tokenizer
            for name, source, sizes in sources(self):
                stream = token_stream(source, tokenizer)
                for window in sizes:
                    wanted = max(2, self.args.windows * 128 // window)
                    rows = windows_of([stream], window, "once", tokenizer.bos_token_id)[:wanted]
                    self._texts.append(Text(name, window, rows))
        return self._texts

    # rows of the table

    def record(self, key: str) -> dict[str, Any]:
        return read_json(self.at("rows") / f"{key}.json") or {}

    def keep(self, key: str, values: dict[str, Any]) -> None:
        (self.at("rows")).mkdir(parents=True, exist_ok=True)
        write_json(self.at("rows") / f"{key}.json", values)
        self.save()


def sources(bench: Bench) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, SOURCE, windows) of the texts that choose nothing; writes what they need."""
    if bench.model is DEMO:
        return [("demo", "demo", (128,))]
    boolq = bench.at("boolq.txt")
    if not boolq.is_file():
        lines = (REAL / "tasks" / "boolq.jsonl").read_text().splitlines()
        passages = list(dict.fromkeys(json.loads(line)["passage"] for line in lines))
        random.Random(1234).shuffle(passages)
        boolq.write_text("\n\n".join(passages[:200]))
    wikitext = bench.at("wikitext.txt")
    if not wikitext.is_file():
        wikitext.write_text((REAL / "wikitext2_test.txt").read_text()[:400_000])
    return [
        ("WikiText-2", str(wikitext), (128, 2048)),
        ("C4", str(bench.at("rest.jsonl")), (128,)),
        ("BoolQ passages", str(boolq), (128,)),
    ]


def split_c4(bench: Bench) -> str:
    """Write the rows that choose and those that do not; return the SOURCE of the first."""
    if bench.model is DEMO:
        return "demo"
    lines = (REAL / "text" / "c4_300.jsonl").read_text().splitlines()
    for name, some in (("fit.jsonl", lines[:200]), ("rest.jsonl", lines[200:])):
        if not bench.at(name).is_file():
            bench.at(name).write_text("\n".join(some) + "\n")
    return str(bench.at("fit.jsonl"))


def mixed(bench: Bench) -> str:
    """Write the rows that choose and as much of Wikipedia; return the SOURCE."""
    path = bench.at("mixed.jsonl")
    if not path.is_file():
        own = bench.at("fit.jsonl").read_text().splitlines()
        size, lines = sum(map(len, own)), list[str]()
        for line in (REAL / "text" / "wikipedia.txt").read_text().splitlines():
            if line.strip():
                lines.append(json.dumps({"text": line}))
                size -= len(line)
            if size < 0:
                break
        path.write_text("\n".join([*own, *lines]) + "\n")
    return str(path)


# choosing


def choose(bench: Bench) -> None:
    """Run the product's commands that choose sets: one run for each kind of choice."""
    dense, counts = str(bench.checkpoint("dense")), ",".join(map(str, sorted(bench.model.counts)))
    text = ("--calibration", bench.calibration, "--device", "cpu")
    bench.run("scores", "importance", dense, "--metrics", "ppl,taylor,block-influence", *text)
    for methods in ("one-shot,greedy", "one-shot,greedy,pairs,evolve", "beam"):
        name = f"search-{methods.split(',')[-1]}"
        if methods.split(",")[-1] in bench.args.methods.split(","):
            bench.run(name, "search", dense, "--counts", counts, "--methods", methods,
                      *bench.model.search, *text)  # fmt: skip
    for options in bench.model.budgets.values():
        out = bench.at(budget_name(options))
        done = (read_json(out / ".run" / "status.json") or {}).get("state") == "done"
        argv = ["budget", dense, "--versions", "drop,no-attention,no-mlp", "--check-plans", "0",
                *options, *text, "--out", str(out)]  # fmt: skip
        if done or not bench.recording:
            bench.commands.append(bench.shown(argv))
        if not done and not bench.recording:
            before, Clock.now = Clock.now, staticmethod(time.process_time)
            torch.set_num_threads(1)
            command_line([*argv, "--overwrite"] if out.exists() else argv)
            Clock.now = before
    if "healed" in bench.args.methods.split(","):
        bench.run("search-healed", "search", dense, "--counts", counts, "--methods",
                  "greedy,evolve", "--heal", "refit", *bench.model.healed_search,
                  *text)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What goes, who chose it, and how long that took."""

    label: str
    removal: Removal
    seconds: float | None = None


def choices(bench: Bench, count: int) -> Iterator[Choice]:
    """Yield what every way of choosing takes, as far as the runs are there."""
    first, last = bench.model.protect
    rows = BlockRow.read(bench.at("scores"))
    summary = read_json(bench.at("scores") / "summary.json") or {}
    for name, label in ONE_SHOT.items():
        free = rows[first : len(rows) - last]
        order = sorted(free, key=lambda row: (getattr(row, name) or math.inf, row.block))
        drop = tuple(sorted(row.block for row in order[:count]))
        seconds = (summary.get("seconds") or {}).get("taylor" if name == "taylor" else "sweep")
        if len(drop) == count:
            yield Choice(label, Removal(drop), seconds)
            if label == BASE:
                yield from solved(bench, drop)
    for name in METHODS:
        for run in ("search-greedy", "search-evolve", "search-beam"):
            found = [r for r in SetRow.read(bench.at(run)) if (r.method, r.count) == (name, count)]
            if found:
                label = "one-shot, KL" if name == "one-shot" else f"{name}, KL"
                yield Choice(label, found[0].removal.ordered, found[0].seconds)
                break
    for row in SetRow.read(bench.at("search-healed")):
        if row.count == count:
            label = f"{row.method}, KL after healing"
            yield Choice(label, row.removal.ordered, row.seconds)


def solved(bench: Bench, drop: Sequence[int]) -> Iterator[Choice]:
    """Yield what the budget runs solve to at the latency without the blocks ``drop``."""
    for label, options in bench.model.budgets.items():
        folder = bench.at(budget_name(options))
        if not budgets.is_run(folder):
            continue
        library = budgets.load(folder)
        choice = ["drop" if block in drop else WHOLE for block in range(library.blocks)]
        latency = budgets.value_of(library, "latency", choice)
        found = budgets.solve(library, Limits(latency=latency), protect=bench.model.protect)
        seconds = library.summary.seconds + library.summary.timing_seconds
        yield Choice(label, found.removal.ordered, seconds)


def budget_name(options: Sequence[str]) -> str:
    """Return the run's name: rows and their length."""
    return "budget-" + "x".join(options[1:4:2])


# measuring


def key_of(removal: Removal, how: str) -> str:
    parts = [
        name + "-".join(map(str, sorted(blocks)))
        for name, blocks in (
            ("drop-", removal.drop),
            ("attention-", removal.attention),
            ("mlp-", removal.mlp),
        )
        if blocks
    ]
    return "_".join([*(parts or ["drop-"]), how.replace(", ", "-")])


def losses(bench: Bench, removal: Removal) -> dict[str, list[float]]:
    """Return the mean loss of every window of every text without ``removal``."""
    found, units = {}, frozenset[Any](removal.drop)
    if removal.partial:
        units = frozenset((part // 2, tuple(PARTS)[part % 2]) for part in parts_of(removal))
    for text in bench.texts:
        batch = make_batch(text.rows, bench.view)
        result = losses_without(bench.view, batch, [units], sublayers=removal.partial)
        assert result is not None
        found[text.label] = result.sample_nll[0]
    return found


def measure(bench: Bench, removal: Removal, how: str) -> None:
    """Measure the model without ``removal``, as it is or healed, unless that is done."""
    key = key_of(removal, how)
    if bench.record(key):
        return
    print(time.strftime("%H:%M:%S"), bench.model.name, key, flush=True)
    values: dict[str, Any] = {"removed": removal.text, "how": how}
    began = time.process_time()
    if how == "plain":
        values["nll"] = losses(bench, removal)
    else:
        found = heal(bench.view, removal, bench.heal_batch(how), REFIT)
        values |= {"heal_s": time.process_time() - began, "kl_before": found.kl_before,
                   "kl_after": found.kl_after, "fit_tokens": found.tokens}  # fmt: skip
        with applied(bench.view, found):
            values["nll"] = losses(bench, removal)
    bench.keep(key, values | {"cpu_s": time.process_time() - began})


def quality(bench: Bench) -> None:
    """Measure every choice, as it is and healed, and the width methods: 8 blocks first."""
    measure(bench, Removal(), "plain")
    for count in bench.model.counts:
        if bench.args.counts and str(count) not in bench.args.counts.split(","):
            continue
        found = {choice.label: choice for choice in choices(bench, count)}
        for label, how in FIRST_ROWS:
            if label in found:
                measure(bench, found[label].removal, how)
        width(bench, count)
        for how in ("plain", REFIT):
            for choice in found.values():
                measure(bench, choice.removal, how)
        width(bench, count, REFIT)
        smallest = count == bench.model.counts[-1]  # takes the least time
        if smallest and BUDGET in found and bench.model is not DEMO:
            measure(bench, found[BUDGET].removal, MIXED)


def least(bench: Bench) -> None:
    """Measure one-shot sets of the least cut, healed."""
    for choice in choices(bench, bench.model.least):
        if not choice.removal.partial:
            measure(bench, choice.removal, REFIT)


def width(bench: Bench, count: int, how: str = "none") -> None:
    """Prune by width to the size that ``count`` blocks leave, heal if asked, and measure."""
    base = next((c for c in choices(bench, count) if c.label == BASE), None)
    if base is None:
        return
    dense = bench.checkpoint("dense")
    info = locate.open(str(dense)).info
    each = (info.parameters - size_without(bench, base.removal.drop)) // count
    for method in WIDTH:
        name = width_name(method, count, how)
        rows = () if method == "llm-pruner" else ("--samples", "128")
        if how != "none":
            fitted, length = map(str, bench.model.heal_rows)
            rows += ("--heal", how, "--heal-samples", fitted, "--heal-length", length)
        done = bench.run(name, "width", str(dense), "--method", method, "--params",
                         str(info.parameters - count * each), "--calibration", bench.calibration,
                         *rows, "--device", "cpu")  # fmt: skip
        if not done or bench.recording or bench.record(name):
            continue
        began = time.process_time()
        model = bench.load(bench.at(name))
        nll = {t.label: list(window_losses(model, t.rows).nll) for t in bench.texts}
        healing = WidthPruning.read(bench.at(name)).healing
        gain = {"kl_before": healing.kl_before, "kl_after": healing.kl_after} if healing else {}
        bench.keep(name, {"nll": nll, "cpu_s": time.process_time() - began, **gain,
                          "params": locate.open(str(bench.at(name))).info.parameters})  # fmt: skip


def width_name(method: str, count: int, how: str = "none") -> str:
    """Return the name of a width method's run."""
    return f"width-{method}-{count}" + ("" if how == "none" else f"-{how}")


def size_without(bench: Bench, drop: Sequence[int]) -> int:
    """Return the parameters that are left without ``drop``."""
    from core.prune.plan import parameters_after

    return parameters_after(locate.open(str(bench.checkpoint("dense"))).info, drop)


# tasks and latency: variants are written by the product


@dataclass(frozen=True)
class Variant:
    """A checkpoint that the product wrote."""

    name: str
    """Its folder."""
    label: str
    row: str
    """Key of its row in the table of perplexities."""
    count: int = 0
    """Blocks removed; 0: none, or those of a width method."""


def variants(bench: Bench) -> list[Variant]:
    """Write the variants of the largest count that matter; return them, width methods' last."""
    count = bench.model.counts[0]
    found = [Variant("dense", "dense", key_of(Removal(), "plain"))]
    for choice in choices(bench, count):
        if choice.label in (BASE, "greedy, KL", BUDGET, best_of(bench, count)):
            found += [_written(bench, choice, how, count) for how in ("none", REFIT)]
    for how in ("none", REFIT):
        for method, label in WIDTH.items():
            name = width_name(method, count, how)
            found.append(Variant(name, label + (f", {how}" if how != "none" else ""), name))
    return found


def smaller(bench: Bench) -> list[Variant]:
    """Write the best healed sets of the smaller counts; return them."""
    return [
        _written(bench, choice, REFIT, count)
        for count in (*bench.model.counts[1:], bench.model.least)
        for choice in choices(bench, count)
        if choice.label == best_of(bench, count)
    ]


def _written(bench: Bench, choice: Choice, how: str, count: int) -> Variant:
    gone = choice.removal
    name = f"depth-{hashlib.sha1(gone.text.encode()).hexdigest()[:8]}-{how}"
    rows, length = bench.model.heal_rows
    more = ("--samples", str(rows), "--length", str(length), "--calibration",
            bench.calibration, "--device", "cpu") if how != "none" else ()  # fmt: skip
    lists = (("--drop", gone.drop), ("--attention", gone.attention), ("--mlp", gone.mlp))
    what = [w for flag, bs in lists if bs for w in (flag, ",".join(map(str, bs)))]
    bench.run(name, "prune", str(bench.checkpoint("dense")), *what, "--heal", how, *more)
    label = choice.label + (f", {how}" if how != "none" else "")
    return Variant(name, label, key_of(gone, "plain" if how == "none" else how), count)


def best_of(bench: Bench, count: int) -> str:
    """Return the label of the set of blocks with the least KL on rows held out from its fits."""
    found = {
        choice.label: record["kl_after"]
        for choice in choices(bench, count)
        if not choice.removal.partial and (record := bench.record(key_of(choice.removal, REFIT)))
    }
    return min(found, key=lambda label: found[label], default="")


def tasks(bench: Bench) -> None:
    """Ask the six tasks of the variants that matter."""
    if bench.model is DEMO:
        return
    plain = [v.name for v in variants(bench) if v.count and not v.label.endswith(REFIT)]
    for variant in sorted(variants(bench), key=lambda v: v.name in plain):
        bench.run(f"tasks-{variant.name}", "evaluate", str(bench.checkpoint(variant.name)),
                  "--tasks", ",".join(TASKS), "--task-dir", str(REAL / "tasks"),
                  "--allow-task-code", "--limit", str(bench.args.questions))  # fmt: skip


def latency(bench: Bench) -> None:
    """Time the variants that matter; on a quiet machine."""
    folders = [str(bench.checkpoint(v.name)) for v in timed(bench)]
    bench.run("benchmark", "benchmark", *folders, "--batch-sizes", "1", "--output-tokens", "32",
              "--time-limit-s", str(bench.args.seconds))  # fmt: skip


def timed(bench: Bench) -> list[Variant]:
    """Return the variants that are timed. A refit changes no shape: width methods' are left out."""
    narrow = [width_name(method, bench.model.counts[0], REFIT) for method in WIDTH]
    return [v for v in [*variants(bench), *smaller(bench)] if v.name not in narrow]


# the page


def interval(ours: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a ratio of perplexities: paired bootstrap over windows."""
    apart = [a - b for a, b in zip(ours, base, strict=True)]
    draw, size = random.Random(1234), len(apart)
    means = sorted(
        math.exp(statistics.fmean(draw.choices(apart, k=size))) for _ in range(RESAMPLES)
    )
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def _wall(bench: Bench, label: str, count: int) -> float | None:
    """Return how long a width method's run took, its import and writing included."""
    for method, name in WIDTH.items():
        if label.startswith(f"width: {name}"):
            how = REFIT if label.endswith(REFIT) else "none"
            run = read_run(bench.at(width_name(method, count, how)))
            return run.seconds if run else None
    return None


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _cells(bench: Bench, record: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Return perplexities, each with its ratio to the base's and the ratio's interval."""
    cells = []
    for label in labels(bench):
        nll = (record.get("nll") or {}).get(label)
        if not nll:
            cells.append("-")
            continue
        ppl = math.exp(statistics.fmean(nll))
        against = (base.get("nll") or {}).get(label)
        if not against or record is base or len(against) != len(nll):
            cells.append(f"{ppl:.1f}")
            continue
        low, high = interval(nll, against)
        ratio = ppl / math.exp(statistics.fmean(against))
        cells.append(f"{ppl:.1f} ({ratio:.2f}, {low:.2f}-{high:.2f})")
    return cells


def labels(bench: Bench) -> list[str]:
    return list((bench.record(key_of(Removal(), "plain")).get("nll")) or {})


def rows_of(bench: Bench, count: int) -> Iterator[tuple[str, Choice | None, dict[str, Any]]]:
    """Yield (label, choice, record) of every row of one count."""
    for how in ("plain", REFIT, MIXED):
        for choice in choices(bench, count):
            healed = "" if how == "plain" else f", {how}"
            record = bench.record(key_of(choice.removal, how))
            if how != MIXED or record:
                yield choice.label + healed, choice, record
    for method, label in WIDTH.items():
        for how in ("none", REFIT):
            words = "" if how == "none" else f", {how}"
            yield f"width: {label}{words}", None, bench.record(width_name(method, count, how))


def table(bench: Bench, count: int) -> list[str]:
    """Return the table of one count."""
    base = next((r for label, _, r in rows_of(bench, count) if label == BASE), {})
    head = ["chosen by", "removed", "seconds to choose", "to heal", *labels(bench)]
    lines = [table_row(head), table_row(["---"] * len(head))]
    dense = bench.record(key_of(Removal(), "plain"))
    lines.append(table_row(["dense", "", "", "", *_cells(bench, dense, {})]))
    for label, choice, record in rows_of(bench, count):
        drop = ""
        if choice:
            gone = choice.removal
            drop = gone.text if gone.partial else block_ranges(gone.drop)
        spent = _seconds(choice.seconds if choice else _wall(bench, label, count))
        cells = _cells(bench, record, base)
        lines.append(table_row([label, drop, spent, _seconds(record.get("heal_s")), *cells]))
    return lines


def aims(bench: Bench) -> list[str]:
    """Return how far the aims for the largest count are met."""
    count, found = bench.model.counts[0], labels(bench)
    rows = {label: r["nll"] for label, _, r in rows_of(bench, count) if r.get("nll")}
    blocks, budget = (f"{label}, {REFIT}" for label in (best_of(bench, count), BUDGET))
    shown = [label for label in (blocks, budget, f"{BUDGET}, {MIXED}") if label in rows]
    if not shown or BASE not in rows:
        return ["Not measured yet."]
    ppl = {k: {t: math.exp(statistics.fmean(n[t])) for t in found} for k, n in rows.items()}
    dense = bench.record(key_of(Removal(), "plain"))["nll"]
    pruner = f"width: {WIDTH['llm-pruner']}"
    lines = [
        f"Perplexity relative to that of one-shot {BASE} as it is (aim: at most 0.50 on every "
        "text) and to LLM-Pruner's of the same size (aim: below 1). The dense model itself is the "
        "bound of the first aim: its ratio is shown beside. Of the sets of whole blocks, the one "
        "with the least KL after healing on calibration rows.",
        "",
        table_row(["text", f"dense / {BASE}",
              *(f"{label} / {other}" for label in shown for other in (BASE, "LLM-Pruner"))]),
        table_row(["---"] * (2 + 2 * len(shown))),
    ]  # fmt: skip
    for text in found:
        cells = [f"{math.exp(statistics.fmean(dense[text])) / ppl[BASE][text]:.2f}"]
        for label in shown:
            for other in (BASE, pruner):
                cells.append(f"{ppl[label][text] / ppl[other][text]:.2f}" if other in ppl else "-")
        lines.append(table_row([text, *cells]))
    return lines


def section(bench: Bench) -> list[str]:
    """Return everything that was measured on one checkpoint."""
    info = locate.open(str(bench.checkpoint("dense"))).info
    dense = bench.record(key_of(Removal(), "plain")).get("nll") or {}
    sizes = {text: len(nll) for text, nll in dense.items()}
    rows, length = bench.model.heal_rows
    lines = [
        f"## {bench.model.name}, {info.blocks} blocks",
        "",
        f"Repairs are fitted on {rows} x {length} calibration tokens, a quarter of them held out; "
        "windows evaluated: " + "; ".join(f"{t}: {n}" for t, n in sizes.items()) + ".",
        "",
    ]
    lines += ["### Against the aims", "", *aims(bench), ""]
    for count in bench.model.counts:
        share = 1 - size_without(bench, tuple(range(1, count + 1))) / info.parameters
        lines += [f"### {count} blocks removed ({share:.1%} of the parameters)", ""]
        some = any(record for _, _, record in rows_of(bench, count))
        lines += [*(table(bench, count) if some else ["Not measured yet."]), ""]
    if bench.model is not DEMO:
        lines += ["### Tasks", "", *task_table(bench), ""]
    lines += ["### Latency", "", *latency_table(bench), ""]
    lines += ["### At the same latency", "", *at_equal_latency(bench), ""]
    commands = list(dict.fromkeys(bench.commands))
    return [*lines, "### Commands", "", "```", *commands, "```", ""]


def task_table(bench: Bench) -> list[str]:
    points = 50 / bench.args.questions**0.5
    lines = [
        f"Accuracy in %, 0-shot, the first {bench.args.questions} questions of each task (standard "
        f"error up to {points:.1f} points each, {points / len(TASKS) ** 0.5:.1f} of the mean). Of "
        "BoolQ's answers 64 % are yes, and models of this size know little more than that: there, "
        "accuracy moves with how often a model says yes.",
        "",
        table_row(["variant", *TASKS, "mean", "mean without boolq"]),
        table_row(["---"] * (len(TASKS) + 3)),
    ]
    bench.recording = True
    for variant in variants(bench):
        rows = Score.read(bench.at(f"tasks-{variant.name}"))
        found = {task: score_in(rows, task) for task in TASKS}
        values = [100 * score.value if score else None for score in found.values()]
        full = [v for v in values if v is not None]
        means = ["-", "-"]
        if len(full) == len(TASKS):
            rest = [v for task, v in zip(TASKS, full, strict=True) if task != "boolq"]
            means = [f"{statistics.fmean(some):.1f}" for some in (full, rest)]
        cells = ("-" if v is None else f"{v:.1f}" for v in values)
        lines.append(table_row([variant.label, *cells, *means]))
    return lines


def speeds(bench: Bench) -> dict[str, float]:
    """Return tokens/s relative to the dense model's, by variant's name, as far as measured."""
    summary = Benchmark.read(bench.at("benchmark"))
    by_path = {entry.path: entry.name for entry in summary.variants} if summary else {}
    points = {p.variant: p for p in Point.read(bench.at("benchmark"))}
    found = {}
    for variant in timed(bench):
        point = points.get(by_path.get(str(bench.checkpoint(variant.name)), ""))
        if point and point.tokens_per_s:
            found[variant.name] = point.tokens_per_s
    dense = found.get("dense")
    return {name: speed / dense for name, speed in found.items()} if dense else {}


def latency_table(bench: Bench) -> list[str]:
    lines = [
        "transformers on a CPU, 12 tokens in, 32 out, batch 1.",
        "",
        table_row(["variant", "blocks removed", "tokens/s relative to dense"]),
        table_row(["---", "---", "---"]),
    ]
    bench.recording = True
    found = speeds(bench)
    for variant in timed(bench):
        speed = f"{found[variant.name]:.2f}x" if variant.name in found else "-"
        removed = str(variant.count) if variant.count and BUDGET not in variant.label else ""
        lines.append(table_row([variant.label, removed, speed]))
    return lines


def at_equal_latency(bench: Bench) -> list[str]:
    """Return the comparison with width methods at the same speed instead of the same size."""
    bench.recording = True
    found, texts = speeds(bench), labels(bench)
    depth = [v for v in timed(bench) if v.count and v.label.endswith(REFIT) and v.name in found
             and v.label == f"{best_of(bench, v.count)}, {REFIT}"]  # fmt: skip
    lines = [
        "Next to each width model of the largest cut's size: of the healed sets above (for each "
        "count the one with the least KL on calibration rows), the smallest that is at least as "
        "fast by the measurement above. Ratios of perplexities, below 1: the depth-pruned model "
        "is better. It has more parameters; a refit changes no shape, so that speed is the "
        "unhealed model's.",
        "",
        table_row(["width model", "tokens/s", "beside it", "blocks removed", "tokens/s", *texts]),
        table_row(["---"] * (5 + len(texts))),
    ]
    for how in ("none", REFIT):
        for method, label in WIDTH.items():
            name = width_name(method, bench.model.counts[0])
            fast = [v for v in depth if found[v.name] >= found.get(name, math.inf)]
            ours = min(fast, key=lambda v: v.count, default=None)
            theirs = bench.record(width_name(method, bench.model.counts[0], how)).get("nll")
            words = label + (f", {how}" if how != "none" else "")
            if ours is None or not theirs:
                lines.append(table_row([words, *["-"] * (4 + len(texts))]))
                continue
            nll = bench.record(ours.row)["nll"]
            cells = [
                f"{math.exp(statistics.fmean(nll[t]) - statistics.fmean(theirs[t])):.2f} "
                "({:.2f}-{:.2f})".format(*interval(nll[t], theirs[t]))
                for t in texts
            ]
            lines.append(table_row([words, f"{found[name]:.2f}x", ours.label, str(ours.count),
                                    f"{found[ours.name]:.2f}x", *cells]))  # fmt: skip
    return lines


def page(benches: Sequence[Bench]) -> str:
    lines = [
        "# Choosing and healing: measured",
        "",
        "Written by `python -m bench.choosing DIR` (part of `make proof`). For each number of "
        "removed blocks: perplexity without training on texts that chose nothing; in brackets, "
        f"relative to one-shot {BASE} without healing, with the 95 % bootstrap interval over "
        "windows. Width methods have the same number of parameters. Seconds to choose are wall "
        "times on a machine that others used more or less at the same time, so they do not "
        "compare; with width methods they include the refit. Those to heal are CPU seconds. A dash "
        "stands for what has not been measured.",
        "",
        "A cut at the same latency removes fewer parameters: attention takes more of the time than "
        "of the size. Latencies are predicted there from a budget run; the last section times the "
        "variants. What was tried besides is in [healing.md](healing.md).",
        "",
    ]
    for bench in benches:
        was = bench.recording
        lines += section(bench)
        bench.recording = was
    return "\n".join(lines).rstrip() + "\n"


STEPS: dict[str, Callable[[Bench], None]] = {
    "choose": choose,
    "quality": quality,
    "least": least,
    "tasks": tasks,
    "latency": latency,
}


def main() -> None:
    """Measure what is missing, and write the page after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="", help="SmolLM2. Default: imported if missing.")
    parser.add_argument(
        "--only", default="choose,quality,least,tasks", help=f"Of {', '.join(STEPS)}."
    )
    parser.add_argument("--models", default="smollm2,demo")
    parser.add_argument("--methods", default="greedy,evolve,beam,healed")
    parser.add_argument("--counts", default="", help="Of 8,6,4 and 4,3,2. Default: all.")
    parser.add_argument("--windows", type=int, default=24, help="Of 128 tokens, for each text.")
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seconds", type=int, default=300)
    args = parser.parse_args()
    if not REAL.is_dir():
        raise SystemExit(f"Skipped: {REAL}, with the texts and questions, is not there.")
    benches: list[Bench] = []

    def write() -> None:
        PAGE.write_text(page(benches), encoding="utf-8")

    for name, model in (("smollm2", SMOLLM2), ("demo", DEMO)):
        folder = (args.folder / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, args, model=model)
        benches.append(bench)
        if model is SMOLLM2 and not args.checkpoint:
            bench.run("smollm2", "import", "smollm2")
        bench.calibration = split_c4(bench)
    for bench in benches:
        bench.page = write
    for step, function in STEPS.items():
        for name, bench in zip(("smollm2", "demo"), benches, strict=True):
            bench.recording = step not in args.only.split(",") or name not in args.models.split(",")
            if not bench.recording:
                function(bench)
            elif step == "choose":  # only lists the commands behind what is there
                choose(bench)
                for count in bench.model.counts:
                    for how in ("none", REFIT):
                        width(bench, count, how)
    write()


if __name__ == "__main__":
    main()
