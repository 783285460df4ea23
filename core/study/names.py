"""What runs and checkpoints are called: the same on every page, in charts and in reports.

A variant is called by how it was made (``FLAP 16%``), a run by what it does to what (``LoRA of
FLAP 16% on alpaca``). A name that a person gave comes first. Runs with the same name are numbered
by age, from the second on.
"""

from __future__ import annotations

import operator
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core import outside
from core.benchmark.command import BenchmarkSpec
from core.checkpoint import locate
from core.checkpoint.vocabulary import AUTO, text_of
from core.retrain.spec import LABELS as RETRAINED
from core.runs import workspace
from core.runs.workspace import RunRecord
from core.study.kinds import Variant
from core.study.lineage import lineages

MOST = 2
"""Checkpoints or texts that a run's name lists; of more, only their number."""
_WORD = re.compile(r"[\w./-]+[\w-]")
_lock = threading.Lock()
_kept: deque[Names] = deque(maxlen=24)
"""The latest, newest first: sessions that draw at the same time may look at different moments."""


def names(records: Sequence[RunRecord]) -> Names:
    """Return the names of these runs, which are all runs of the workspace, and what they made.

    Kept until one of the records changes.
    """
    with _lock:
        found = next((one for one in _kept if one.are_of(records)), None)
        if found is None:
            found = Names(records)
            _kept.appendleft(found)
        return found


class Names:
    """Names of the runs of a workspace, and of the checkpoints that they made or used."""

    def __init__(self, records: Sequence[RunRecord]) -> None:
        """Find the variants that these runs made, and name every run."""
        self._records = list(records)
        self._made: dict[str, tuple[Variant, Variant]] = {}
        for lineage in lineages(records):
            for variant in lineage.variants[1:]:
                self._made[variant.id] = (variant, lineage.dense)
        self._by_folder = {r.path.absolute(): r for r in records if r.id in self._made}
        self.runs: Mapping[str, str] = self._titles()
        """The name of every run, by its id."""
        # an id that may be a word of a sentence, and the folder of an import, stay as they are
        telling = [r for r in records if re.search(r"[-/]", r.id) and r.command != "import"]
        self._known = {
            name: self.runs[r.id] for r in records for name in (str(r.path.absolute()), str(r.path))
        } | {r.id: self.runs[r.id] for r in telling}

    def are_of(self, records: Sequence[RunRecord]) -> bool:
        """Whether these are the names of exactly these records."""
        mine = self._records
        return len(mine) == len(records) and all(map(operator.is_, mine, records))

    def run(self, record: RunRecord) -> str:
        """Return the name of a run; its id if it is not one of the workspace's."""
        return self.runs.get(record.id) or record.name

    def in_words(self, text: str) -> str:
        """Return a sentence with the ids and paths of runs in it replaced by their names."""
        return _WORD.sub(lambda found: self._known.get(found[0], found[0]), text)

    def _titles(self) -> dict[str, str]:
        seen: dict[str, int] = {}
        found = {}
        for record in sorted(self._records, key=lambda r: (r.started, r.id)):
            name = record.given or self._run(record)
            count = seen[name] = seen.get(name, 0) + 1
            found[record.id] = f"{name} ({count})" if count > 1 else name
        return found

    def _run(self, record: RunRecord) -> str:
        kind = _KINDS.get(record.command)
        return kind(self, record) if kind else record.id

    def checkpoint(self, name: str, cwd: str = "") -> str:
        """Return what a checkpoint is called, by its name in a spec, an address or a summary."""
        if found := self._owner(name, cwd):
            variant, dense = self._made[found.id]
            by_hand = variant.label.startswith("without ")
            return f"{dense.label} {variant.label}" if by_hand else variant.label
        return locate.plain_name(name) if name else "no checkpoint"

    def of_spec(self, record: RunRecord) -> str:
        """Return what the checkpoint of a run's spec is called."""
        return self.checkpoint(str(record.spec.get("checkpoint") or ""), record.cwd)

    def variant(self, record: RunRecord) -> str:
        """Return what a run that makes a variant is called."""
        dense, label = self._made[record.id][1], self.checkpoint(record.id)
        return label if dense.label in label else f"{label} of {dense.label}"

    def _owner(self, name: str, cwd: str) -> RunRecord | None:
        starts = [outside.path_of(name), workspace.default_root() / name]
        starts += [Path(cwd) / name] if cwd else []
        for start in starts:
            path = Path(os.path.abspath(start))
            for folder in (path, path.parent):  # the run itself, or its merged/
                if folder in self._by_folder:
                    return self._by_folder[folder]
        return None


def source(text: object, checkpoint: object = "") -> str:
    """Return what a SOURCE is called: a file's name without folders and ending.

    ``checkpoint``: the name of the checkpoint whose default text auto means.
    """
    given = str(text or "")
    if given in ("", AUTO):
        folder = locate.local_folder(str(checkpoint)) if checkpoint else None
        return text_of(given, folder) if folder else "the default text"
    if given.startswith("hub:"):
        return given.removeprefix("hub:").split(":")[0]
    name = Path(given.split("::")[0]).name
    for ending in (".gz", ".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(ending)
    return name or given


def _listed(names: Sequence[str], more: str) -> str:
    """Return names in a row; of more than `MOST`, the first and how many others."""
    if len(names) <= MOST:
        return " and ".join(names)
    return f"{names[0]} and {len(names) - 1} {more}"


def _items(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else []


def _retrained(called: Names, record: RunRecord) -> str:
    method = str(record.spec.get("method") or "lora")
    given = record.spec.get("checkpoint")
    text = source(record.spec.get("data"), given)
    return f"{RETRAINED.get(method, method)} of {called.of_spec(record)} on {text}"


def _generated(called: Names, record: RunRecord) -> str:
    text = source(record.spec.get("prompts"), record.spec.get("checkpoint"))
    return f"Answers of {called.of_spec(record)} on {text}"


def _on_text(what: str) -> Callable[[Names, RunRecord], str]:
    def name(called: Names, record: RunRecord) -> str:
        text = source(record.spec.get("calibration"), record.spec.get("checkpoint"))
        return f"{what} of {called.of_spec(record)} on {text}"

    return name


def _of(what: str) -> Callable[[Names, RunRecord], str]:
    return lambda called, record: f"{what} of {called.of_spec(record)}"


def _evaluation(called: Names, record: RunRecord) -> str:
    given = record.spec.get("checkpoint")
    texts = [source(text, given) for text in _items(record.spec.get("perplexity"))]
    what = [*texts, *_items(record.spec.get("tasks"))]
    on = f" on {_listed(what, 'more')}" if what else ""
    return f"Evaluation of {called.of_spec(record)}{on}"


def _benchmark(called: Names, record: RunRecord) -> str:
    if record.spec.get("rates_only"):
        return f"Rates of {record.spec.get('device') or BenchmarkSpec.device}"
    names = [called.checkpoint(name, record.cwd) for name in _items(record.spec.get("checkpoints"))]
    return f"Benchmark of {_listed(names, 'others') if names else 'nothing'}"


def _export(called: Names, record: RunRecord) -> str:
    kinds = {"gguf": "GGUF file", "mergekit": "mergekit recipe", "hub": "Upload"}
    kind = str(record.spec.get("format") or "")
    return f"{kinds.get(kind, 'Export')} of {called.of_spec(record)}"


def _imported(called: Names, record: RunRecord) -> str:
    return f"Import of {Path(str(record.spec.get('source') or '')).name}"


def _recipe(called: Names, record: RunRecord) -> str:
    name = str(record.spec.get("name") or "").replace("-", " ")
    if name != "make":
        return f"Recipe {name} on {called.of_spec(record)}"
    return f"{_made(record)} of {called.of_spec(record)}, made and measured"


def _made(record: RunRecord) -> str:
    """Return what recipe make makes: which blocks go, and what repairs the cut."""
    spec = record.spec
    blocks = [b for b in spec.get("drop") or () if type(b) is int]
    parts = [b for n in ("attention", "mlp", "mlp_width") for b in spec.get(n) or ()]
    if blocks or parts:
        count = f"{len(blocks)} {'block' if len(blocks) == 1 else 'blocks'}" if blocks else ""
        what = "without " + " and ".join(filter(None, [count, f"{len(parts)} parts" * bool(parts)]))
    else:
        ratio = spec.get("ratio")
        what = f"{ratio:.0%} smaller" if isinstance(ratio, float) else "a smaller one"
    healed, tuned = str(spec.get("heal") or "none"), str(spec.get("retrain") or "none")
    repair = RETRAINED.get(tuned, "") if tuned != "none" else "healed" * (healed != "none")
    return f"{what} + {repair}" if repair else what


_KINDS: dict[str, Callable[[Names, RunRecord], str]] = {
    "importance": _on_text("Scores"),
    "search": _on_text("Search"),
    "budget": _on_text("Versions"),
    "curve": _of("Curve"),
    "prune": Names.variant,
    "width": Names.variant,
    "quantize": Names.variant,
    "retrain": _retrained,
    "generate": _generated,
    "evaluate": _evaluation,
    "benchmark": _benchmark,
    "export": _export,
    "import": _imported,
    "live": _of("Live model"),
    "recipe": _recipe,
    "demo": lambda called, record: "Demonstration",
    "doctor": lambda called, record: "Check of this machine",
}
