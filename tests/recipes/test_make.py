"""Recipe make: one variant from the cut to its figures, resumed after a kill, offered on pages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import study_helpers as made
import tiny
from run_helpers import kill, wait_for, wait_until
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.benchmark import results as benchmark
from core.errors import RunError
from core.prune.results import Pruning
from core.recipes import duration, make
from core.recipes.chain import Chain, Expected, Step
from core.recipes.results import RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import jobs, workspace
from core.runs.progress import SILENT, Progress
from core.runs.spec import build
from core.runs.workspace import read_run
from core.width.results import WidthPruning

APP = str(Path(__file__).parents[2] / "app.py")


def rows_of(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.usefixtures("prepared_runs")
def test_a_variant_is_made_and_measured_and_a_killed_chain_goes_on(tiny_gqa, place, tmp_path):
    texts = tmp_path / "train.txt", tmp_path / "eval.txt"
    for number, path in enumerate(texts):
        path.write_text(tiny.text(300, seed=number))
    options = {"name": "make", "checkpoint": str(tiny_gqa), "drop": (2,), "retrain": "lora",
               "steps": 120, "data": ",".join(map(str, texts)), "device": "cpu",
               "width": "flap"}  # fmt: skip
    record = jobs.launch("recipe", options, place)
    step = record.path / "retrained"
    wait_until(lambda: any((step / ".run" / "checkpoints").glob("checkpoint-[1-9]*")), 90)
    kill(read_run(record.path))
    kill(read_run(step))
    assert wait_for(record, "lost")
    first = read_run(record.path / "pruned").status["pid"]
    spec = json.loads((record.path / ".run" / "spec.json").read_text())
    assert "--drop 2" in " ".join(spec["argv"])
    done = wait_for(jobs.restart(read_run(record.path)), "done", "failed", seconds=150)
    assert done.state == "done", done.log_tail()
    assert read_run(record.path / "pruned").status["pid"] == first  # not cut again
    assert read_run(step).spec["resume"]

    found = RecipeSummary.read(record.path)
    ppl = {name: float(rows_of(record.path / f"evaluate-{name}" / "perplexity.csv")[0]["ppl"])
           for name in ("dense", "pruned", "retrained")}  # fmt: skip
    figures = found.figures
    assert figures["variant"] == f"{record.id}/retrained"
    assert figures["ppl"] == pytest.approx(ppl["retrained"])
    assert figures["ppl_dense"] == pytest.approx(ppl["dense"])
    points = {p.variant: p for p in benchmark.Point.read(record.path / "speed")}
    slow, fast, other = (p.latency_s_p50 for p in points.values())
    assert figures["width"]["speedup"] == pytest.approx(slow / other, rel=0.01)
    assert figures["speedup"] == pytest.approx(slow / fast, rel=0.01)
    assert found.verdict.startswith("without 2 ")
    assert "+ LoRA: " in found.verdict
    times = ppl["retrained"] / ppl["dense"]
    assert f"on eval.txt, {times:.2f} times dense" in found.verdict
    assert f"perplexity was {ppl['pruned']:.4g}" in found.findings[0]
    assert found.take == figures["label"]
    narrow, flap = figures["width"], WidthPruning.read(record.path / "narrower")
    assert flap.method == "flap"
    assert flap.target.parameters == Pruning.read(record.path / "pruned").parameters_after
    assert narrow["variant"] == f"{record.id}/narrower"
    assert narrow["ppl"] == float(
        rows_of(record.path / "evaluate-narrower" / "perplexity.csv")[0]["ppl"]
    )
    assert any(line.startswith("FLAP ") and "not retrained" in line for line in found.findings)


def test_a_ratio_chooses_the_blocks_and_the_steps_know_their_options(tiny_gqa, tmp_path):
    spec = RecipeSpec(name="make", checkpoint=str(tiny_gqa), ratio=0.2, heal="linear",
                      retrain="full", width="wanda-sp", tasks=("demo",),
                      out=str(tmp_path))  # fmt: skip
    chain = Chain(spec, tmp_path, SILENT)
    make.check(spec)
    steps = make.steps(spec)
    assert [s.name for s in steps] == [
        "scores", "plan-pruned", "pruned", "retrained", "narrower", "evaluate-dense",
        "evaluate-pruned", "evaluate-retrained", "evaluate-narrower", "tasks-dense",
        "tasks-retrained", "tasks-narrower", "speed",
    ]  # fmt: skip
    for step in steps:
        if step.command != "retrain":
            values = dict(step.values(chain) if callable(step.values) else step.values)
            values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
            entry = jobs.commands.get(step.command)
            build(entry.spec_class, values | ({"out": "x"} if entry.is_run else {}))
    speed = steps[-1].values
    assert len(speed(chain)["checkpoints"]) == 3
    chain.failed["narrower"] = "too small"
    assert len(speed(chain)["checkpoints"]) == 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ((), "Nothing to remove was named"),
        (("--drop", "9"), "Block 9 does not exist"),
        (("--drop", "1", "--ratio", "0.2"), "Both --ratio and blocks are given"),
        (("--drop", "1", "--data", "a,b,c"), "this recipe takes two sources, got 3"),
    ],
)
def test_bad_input_is_one_sentence_before_any_step(tiny_gqa, tmp_path, capsys, more, sentence):
    out = tmp_path / "out"
    assert main(["recipe", "make", str(tiny_gqa), "--out", str(out), *more]) == 2
    assert sentence in capsys.readouterr().err
    assert not (out / "pruned").exists()


def test_a_step_that_left_its_result_out_is_carried_out_again(place, tmp_path):
    folder = place.root / "recipe-1"
    spec = RecipeSpec(name="importance", out=str(folder))
    jobs.save_spec(folder, jobs.commands.get("recipe"), spec)
    chain = Chain(spec, folder, SILENT)
    step = Step("one", "wait", {"steps": 1, "pause": 0.01}, leaves="merged/config.json")
    with pytest.raises(RunError, match="Step one finished without merged/config.json"):
        chain.run([step])
    first = read_run(chain.dir("one")).status["pid"]
    with pytest.raises(RunError):
        chain.run([step])
    assert read_run(chain.dir("one")).status["pid"] != first
    (chain.dir("one") / "merged").mkdir()
    (chain.dir("one") / "merged" / "config.json").write_text("{}")
    last = read_run(chain.dir("one")).status["pid"]
    chain.run([step])
    assert read_run(chain.dir("one")).status["pid"] == last


def planned(root, dense):
    """Write a curve run that measured the plan without blocks 2 and 3."""
    folder = made.run(root, "curve", "curve", 1, checkpoint=dense)
    summary = {"dense_ppl": 8.0, "drops": {"ppl 2": [2, 3]}, "calibration": "english", "samples": 2,
               "length": 16, "seed": 1, "device": "cpu", "dtype": "float32"}  # fmt: skip
    workspace.write_json(folder / "summary.json", summary)
    columns = ("criterion", "count", "ratio", "params", "ppl")
    workspace.write_csv(folder / "curve.csv", columns, [("ppl", 2, 0.2, 900, 9.5)])


@pytest.mark.parametrize("page", ["prune", "compare"])
def test_the_button_starts_the_chain_with_the_study_s_values(page, tiny_gqa, place, monkeypatch):
    planned(place.root, tiny_gqa)
    at = AppTest.from_file(APP, default_timeout=90).switch_page(f"pages/{page}.py")
    query = {"prune": {"drop": "2,3"}, "compare": {"point": "plan:ppl:2,3"}}[page]
    for name, value in {"model": str(tiny_gqa), **query}.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception, at.exception
    line = next(c.value for c in at.code if "recipe make" in c.value)
    assert "--drop 2,3" in line
    assert "--data english" in line
    assert "--width flap" in line
    assert ("--criterion ppl" in line) is (page == "compare")  # by hand on the other
    asked = []

    def launch(command, values, where, **_):
        asked.append((command, build(RecipeSpec, {**values, "out": "DIR"})))
        return jobs.launch("wait", {"steps": 1, "pause": 0.01}, where)

    monkeypatch.setattr(jobs, "launch_once", launch)
    next(b for b in at.button if b.label == "Make it and measure it").click().run()
    assert not at.exception, at.exception
    ((command, spec),) = asked
    assert (command, spec.name, spec.drop, spec.retrain) == ("recipe", "make", (2, 3), "lora")
    assert jobs.command_line(command, spec) == line


def test_every_step_has_a_duration_which_follows_what_was_measured(tiny_gqa, place, tmp_path):
    text = tmp_path / "train.jsonl"
    text.write_text('{"text": "Ann sees the ball."}\n' * 30)
    options = {"checkpoint": str(tiny_gqa), "name": "make", "out": "x", "device": "cpu",
               "width": "flap", "retrain": "lora", "data": f"{text},english"}  # fmt: skip
    for more in ({"drop": (2,), "heal": "linear"}, {"ratio": 0.2, "tasks": ("demo",)}):
        spec = RecipeSpec(**options, **more)
        found = make.expected(spec)
        assert list(found.seconds) == [s.name for s in make.steps(spec)]
        assert all(seconds > 0 for seconds in found.seconds.values())
        assert "assumed" in found.origin
    slow = RecipeSpec(**options, ratio=0.2, steps=4000)
    long, short = (
        one.seconds["retrained"] - duration.START_S for one in (make.expected(slow), found)
    )
    assert long > 40 * short
    book = made.run(place.root, "earlier", "evaluate", 1)
    summary = {"flops_per_s": 1e3, "parameters": 30_000, "device": "cpu"}
    workspace.write_json(book / "summary.json", summary)
    again = make.expected(spec)
    assert "last run" in again.origin
    assert again.seconds["evaluate-dense"] > 100 * found.seconds["evaluate-dense"]
    assert make.expected(RecipeSpec(**{**options, "device": "cuda"}, ratio=0.2)) is None
    assert make.expected(RecipeSpec(**{**options, "checkpoint": "no/such"}, ratio=0.2)) is None


def test_a_chain_knows_the_time_left_from_what_its_steps_take(place, tmp_path):
    told = []

    class Told(Progress):
        def step(self, done, total, message="", *, left_s=None):
            told.append((done / total, message, left_s))

    spec = RecipeSpec(name="importance", out=str(tmp_path))
    jobs.save_spec(tmp_path, jobs.commands.get("recipe"), spec)
    asked = iter([{"one": 10.0, "two": 30.0}, {"one": 10.0, "two": 60.0}])
    chain = Chain(spec, tmp_path, Told(), lambda _: Expected(next(asked), "rates"))
    chain.run([Step(name, "wait", {"steps": 1, "pause": 0.01}) for name in ("one", "two")])
    first = told[0]
    second = next(t for t in told if t[1] == "two")
    assert first == (0.0, "one", 40.0)
    assert second == (0.25, "two", 60.0)  # of the first answer's whole; the time by the newest
    assert told[-1][0] == 1.0
