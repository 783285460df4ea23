"""The paper's table: what is trained on is not judged on; rows and means are what the steps say."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from core import recipes
from core.errors import OptionError
from core.recipes import paper_table
from core.recipes.chain import Chain
from core.recipes.command import RecipeSpec
from core.runs import workspace
from core.runs.progress import SILENT


def chain(folder, checkpoint, **options):
    spec = RecipeSpec(name="paper-table", checkpoint=str(checkpoint), out=str(folder), **options)
    return Chain(spec, folder, SILENT)


def values_of(made):
    """The options of every step whose options need no earlier step's files."""
    steps = {step.name: step for step in recipes.get("paper-table").steps(made.spec)}
    names = [n for n in steps if n.startswith(("scores", "evaluate-", "tasks-", "lora-"))]
    for name in names:
        if name.startswith("lora-"):  # retraining looks at what it retrains
            made.dir(name.removeprefix("lora-")).symlink_to(made.spec.checkpoint)
    return {name: steps[name].values(made) for name in names}


def test_nothing_is_evaluated_on_text_that_was_trained_on(tmp_path, tiny_gqa):
    lines = [f"Line {i} of the text." for i in range(50)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    found = values_of(chain(tmp_path, tiny_gqa, data=str(text)))
    trained = {v["calibration"] for n, v in found.items() if n == "scores"}
    trained |= {v["data"] for n, v in found.items() if n.startswith("lora-")}
    judged = {v["perplexity"] for n, v in found.items() if n.startswith("evaluate-")}
    (train,), ((held,),) = trained, judged
    rows = [[row["text"] for row in workspace.json_lines(Path(path))] for path in (train, held)]
    assert not set(rows[0]) & set(rows[1])
    assert sorted(rows[0] + rows[1]) == sorted(lines)


def test_which_tasks_are_asked(tmp_path, tiny_gqa):
    ask = paper_table.tasks_of
    assert ask(chain(tmp_path, tiny_gqa).spec)["tasks"] == ("paper",)
    assert ask(chain(tmp_path, tiny_gqa).spec)["limit"] is None
    assert ask(chain(tmp_path, "demo").spec)["tasks"] == ("demo",)
    own = ask(chain(tmp_path, "demo", tasks=("piqa",), task_dir="there", limit=7).spec)
    assert own == {"tasks": ("piqa",), "task_dir": "there", "limit": 7}
    with pytest.raises(OptionError, match="unknown task 'piqqa'.*piqa"):
        recipes.get("paper-table").steps(chain(tmp_path, tiny_gqa, tasks=("piqqa",)).spec)


TASKS = {"piqa": ("acc", 0.5), "hellaswag": ("acc_norm", 0.4), "sciq": ("acc", 0.9)}


def filled(folder, checkpoint):
    """A chain whose steps have left their files; two criteria at one and two blocks of five."""
    made = chain(folder, checkpoint, tasks=tuple(TASKS))
    about = {"device": "cpu", "dtype": "float32", "samples": 4, "length": 24, "seed": 1}
    workspace.write_json(folder / "scores" / "summary.json", about | {"calibration": "demo"})
    ppl = {"dense": 2.0}
    for at, (name, _, count) in enumerate(paper_table.variants(made.spec)):
        ppl |= {name: 4.0 + at, f"lora-{name}": 3.0 + at / 2}
        record = {"parameters_after": 100 - 10 * count, "ratio": count / 10}
        workspace.write_json(folder / name / "pruning.json", record)
    for at, (name, value) in enumerate(ppl.items()):
        workspace.write_csv(
            folder / f"evaluate-{name}" / "perplexity.csv",
            ("source", "window", "bos", "tokens", "ppl"),
            [("demo", 128, "once", 100, value)],
        )
        workspace.write_json(
            folder / f"evaluate-{name}" / "summary.json", {"parameters": 100, "blocks": 5}
        )
        rows = [(t, m, v - at / 100, 0.1, 9) for t, (m, v) in TASKS.items()]
        rows.insert(1, ("piqa", "acc_norm", 0.0, 0.1, 9))
        if name in ("dense",) or name.startswith("lora-"):
            workspace.write_csv(
                folder / f"tasks-{name}" / "tasks.csv",
                ("task", "metric", "value", "stderr", "samples"),
                rows,
            )
    shake = (0.99, 1.0, 1.01, 1.0)
    names = ("dense", *(f"cut-{n}" for n in paper_table.counts(made.spec)))
    times = [
        (name, 1, i % 2, s / (1 + at)) for at, name in enumerate(names) for i, s in enumerate(shake)
    ]
    columns = ("variant", "batch_size", "visit", "latency_s")
    workspace.write_csv(folder / "speed" / "runs.csv", columns, times)
    workspace.write_json(
        folder / "speed" / "summary.json", {"variants": [{"name": n} for n in names]}
    )
    return made, ppl


def test_the_table_is_what_the_steps_have_measured(tmp_path, tiny_gqa):
    made, ppl = filled(tmp_path, tiny_gqa)
    found = recipes.get("paper-table").verdict(made)
    with (tmp_path / "table.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    own = [row for row in rows if row["kind"] == "measured"]
    assert [float(row["ppl"]) for row in own] == pytest.approx(list(ppl.values()))
    mean = sum(value for _, value in TASKS.values()) / len(TASKS)
    for at, (name, row) in enumerate(zip(ppl, own, strict=True)):
        asked = name == "dense" or name.startswith("lora-")
        assert bool(row["tasks_mean"]) is asked
        if asked:
            assert float(row["tasks_mean"]) == pytest.approx(mean - at / 100)
            assert float(row["tasks_stderr"]) == pytest.approx(0.1 / math.sqrt(3))
    assert [float(row["speedup"]) for row in own] == [1, 2, 2, 2, 2, 3, 3, 3, 3]
    others = [row for row in rows if row["kind"] == "published"]
    assert {"12.62", "17.66", "20.21"} <= {row["ppl"] for row in others}  # METHODS, section 4
    assert "Without 2 of 5 blocks (20% of the parameters)" in found.sentence
    assert "perplexity is 3.000 x dense, and 2.000 x after LoRA" in found.sentence
    assert "3.00 x dense" in found.sentence
    assert found.findings[0] == f"Dense: perplexity 2, tasks {mean:.3f} ± 0.058."


def test_without_tasks_the_table_says_why(tmp_path, tiny_gqa):
    made, _ = filled(tmp_path, tiny_gqa)
    asked = ("dense", *(f"lora-{name}" for name, *_ in paper_table.variants(made.spec)))
    made.failed = {f"tasks-{name}": "The data of task 'piqa' is not here." for name in asked}
    found = recipes.get("paper-table").verdict(made)
    assert not any("tasks_mean" in row for row in found.figures["rows"])
    assert any("No tasks were run. The data of task 'piqa'" in line for line in found.findings)
