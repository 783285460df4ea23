"""The Search section and the pair matrix without a browser, against the run's own files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from core.charts import search as charts
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.findings import of_search
from core.findings import sets as sets_findings
from core.findings.sets import differences, of_texts, spread
from core.runs import workspace
from core.search import command, known
from core.search.results import Found, HeldoutRow, PairRow, Search, SetRow, found_so_far
from core.ui import prune_pad, search_form

ROOT = Path(__file__).parents[2]
SETS = {"one-shot": "1 2", "greedy": "1 3"}
KL = {"one-shot": 0.5, "greedy": 0.3}
PAIRS = [(1, 2, 0.5, 0.3), (1, 3, 0.3, -0.1), (2, 3, 0.31, 0.01)]


class Files:
    """Writes result files as a run does, into a folder."""

    def __init__(self, folder):
        self.folder = folder

    def write_json(self, name, value):
        workspace.write_json(self.folder / name, value)

    def write_csv(self, name, columns, rows):
        workspace.write_csv(self.folder / name, columns, rows)


def row(method, drop, kl, count=2, **more):
    how = {"params": 100, "ratio": 0.4, "nll": 2.0, "passes": 9, "seconds": 1.5}
    return SetRow(method, "kl", "none", count, drop, kl=kl, **{**how, **more})


def heldout(drop, values):
    return [HeldoutRow("none", drop, at, 31, 2.0 + kl, kl) for at, kl in enumerate(values)]


@pytest.fixture
def searched(tmp_path, monkeypatch, tiny_gqa):
    """A workspace with one finished search of the tiny checkpoint."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    folder = tmp_path / "sets"
    (folder / ".run").mkdir(parents=True)
    spec = {"checkpoint": str(tiny_gqa), "out": str(folder)}
    workspace.write_json(folder / ".run" / "spec.json", {"command": "search", "spec": spec})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    files = Files(folder)
    summary = {"checkpoint_key": headers.inspect(tiny_gqa).key, "methods": [*SETS], "samples": 4}
    text = {"calibration": "demo", "length": 32, "seed": 7, "device": "cpu", "tokens": 124}
    other = {"heldout": "the held-out part of demo", "heldout_tokens": 124, "objective": "kl"}
    files.write_json("summary.json", {**summary, **text, **other, "compute_dtype": "float32"})
    found = [row(name, drop, KL[name], heldout_kl=KL[name] + 0.1) for name, drop in SETS.items()]
    SetRow.write(files, found)
    PairRow.write(files, [PairRow(a, b, 2.0, kl, beyond) for a, b, kl, beyond in PAIRS])
    rows = [*heldout("1 2", (0.5, 0.7) * 3), *heldout("1 3", (0.3, 0.5) * 3)]
    HeldoutRow.write(files, rows)
    lines = [Found("one-shot", 2, 12, 0.5), Found("greedy", 2, 20, 0.3)]
    text = "".join(json.dumps(one.__dict__) + "\n" for one in lines)
    (folder / ".run" / "metrics.jsonl").write_text(text + '{"method": "gre')
    return folder


def open_page(page, tiny_gqa, **query):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    for name, value in {"model": str(tiny_gqa), **query}.items():
        at.query_params[name] = value
    at.session_state["search_form"] = True  # the form is open
    at.switch_page(f"pages/{page}.py").run()
    assert not at.exception, at.exception
    return at


def test_the_section_shows_the_sets_of_the_file(searched, tiny_gqa):
    at = open_page("prune", tiny_gqa)
    table = next(d.value for d in at.dataframe if "blocks dropped" in d.value)
    assert table["method"].tolist() == ["greedy", "one-shot"]  # the cheapest first
    assert table["blocks dropped"].tolist() == ["1, 3", "1, 2"]
    assert table["KL, held-out"].tolist() == pytest.approx([0.4, 0.6])
    captions = " ".join(c.value for c in at.caption)
    assert "demo, 4 x 32 tokens, seed 7" in captions
    assert "held-out text: the held-out part of demo (124 predictions); cpu, float32" in captions
    sentences = " ".join(m.value for m in at.markdown)
    assert "the set of greedy costs 0.2000 nats of KL per token less than that of one-shot" in (
        sentences
    )
    curve = next(
        f
        for c in at.get("plotly_chart")
        if "block passes" in json.dumps(f := json.loads(c.proto.spec))
    )
    marks = {t["name"]: (t["x"], t["y"]) for t in curve["data"] if t.get("mode") == "markers"}
    assert marks == {"one-shot": ([12], [0.5]), "greedy": ([20], [0.3])}


def test_the_estimate_and_the_command_are_those_of_the_dry_run(searched, tiny_gqa):
    at = open_page("prune", tiny_gqa)
    at.text_input(key="in_search_counts").set_value("1-2").run()
    shown = next(c.value for c in at.code if " search " in c.value)
    assert f"python -m core search {tiny_gqa} --out DIR --counts 1,2 " in shown
    assert "--protect-first 1 --protect-last 1" in shown
    spec = command.SearchSpec(checkpoint=str(tiny_gqa), out="x", counts=(1, 2))
    passes = command.dry_run(spec)["total_passes"]
    assert f"in {passes:,} block passes" in " ".join(c.value for c in at.caption)
    at.selectbox(key="in_search_units").set_value("sublayer").run()
    shown = next(c.value for c in at.code if " search " in c.value)
    assert "--units sublayer" in shown
    assert "--counts" not in shown
    at.selectbox(key="in_search_units").set_value("block").run()
    at.text_input(key="in_search_counts").set_value("9").run()
    assert "'Numbers of blocks': 9 is out of range" in " ".join(e.value for e in at.error)
    assert at.button(key="search_start").disabled


def test_a_click_takes_the_set_into_the_plan(monkeypatch):
    pad = prune_pad.Pad()
    rows = (row("greedy", "1 3", 0.3), row("one-shot", "1 2", 0.5))
    kept = {prune_pad._STATE: pad, "t": {"selection": {"rows": [], "cells": [(1, "method")]}}}
    fake = SimpleNamespace(session_state=kept, toast=lambda text: None)
    monkeypatch.setattr(prune_pad, "st", fake)
    monkeypatch.setattr(search_form, "st", fake)
    search_form.take("t", rows)
    assert pad.drop == (1, 2)
    assert pad.found == ("one-shot", Removal((1, 2)))
    parts = row("greedy", "3.attention 2.attention 2.mlp 1.mlp", 0.2, 4)
    kept["t"] = {"selection": {"rows": [0], "cells": []}}
    search_form.take("t", (parts,))
    assert pad.removal == Removal((2,), (3,), (1,))
    assert known.cells([parts], Search(units="sublayer"))[0]["dropped"] == pad.removal.text
    pad.change(Removal((1, 2)))
    point = {"customdata": [3, 1, "words"]}
    kept["m"] = {"selection": {"points": [point]}}
    prune_pad.pair_clicked("m")
    assert pad.drop == (1, 2, 3)
    kept["n"] = {"selection": {"points": [point]}}
    prune_pad.pair_clicked("n")
    assert pad.drop == (2,)


def test_methods_are_compared_on_rows_that_chose_nothing():
    sets = [row(name, drop, KL[name]) for name, drop in SETS.items()]
    apart = [*heldout("1 2", (0.5, 0.7) * 3), *heldout("1 3", (0.3, 0.5) * 3)]
    (found,) = differences(sets, apart, "kl")
    assert (found.chosen, found.others, found.rows) == (("greedy",), ("one-shot",), 6)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    noisy = [*heldout("1 2", (0.1, 0.9) * 3), *heldout("1 3", (0.8, 0.2) * 3)]
    (found,) = differences(sets, noisy, "kl")
    assert found.mean == pytest.approx(0)
    assert not found.is_certain
    assert differences(sets, noisy[::6], "kl") == []  # one row: nothing to resample


def test_noise_is_called_noise_however_many_sets_are_compared():
    """Of 40 searches whose 12 comparisons are chance, few may find a difference beyond noise."""
    draw, wrong = np.random.default_rng(5), 0
    for _ in range(40):
        sets, rows = [], []
        for count in range(2, 8):
            names = [f"{' '.join(map(str, range(count - 1)))} {10 + n}" for n in range(3)]
            for at, name in enumerate(names):
                sets.append(row(f"m{at}", name, 0.3 + at / 100, count))
                rows += heldout(name, draw.normal(0.3, 0.1, 10).tolist())
        found = differences(sets, rows, "kl")
        assert len(found) == 12
        wrong += any(one.is_certain for one in found)
    assert wrong <= 8
    assert [sets_findings.fewest(number) for number in (1, 12, 32)] == [6, 9, 11]


def test_methods_that_do_not_differ_are_said_to(searched):
    files = Files(searched)
    HeldoutRow.write(
        files,
        [*heldout("1 2", (0.1, 0.9) * 3), *heldout("1 3", (0.8, 0.2) * 3)],
    )
    assert "do not differ beyond noise: with 2 blocks" in of_search(searched).sentence
    about = json.loads((searched / "summary.json").read_text())
    files.write_json("summary.json", {**about, "units": "sublayer"})
    assert "beyond noise: with 2 parts removed" in of_search(searched).sentence
    few = [*heldout("1 2", (0.5,) * 5), *heldout("1 3", (0.3,) * 5)]
    HeldoutRow.write(files, few)
    assert of_search(searched).sentence.startswith("5 held-out rows are too few")
    SetRow.write(files, [row("one-shot", "1 2", 0.5), row("greedy", "2 1", 0.5)])
    assert of_search(searched).sentence == "All methods found the same sets for 2 parts removed."


def test_the_pair_matrix_shows_the_file_in_words(searched, tiny_gqa):
    at = open_page("importance", tiny_gqa)
    figure = next(
        f for c in at.get("plotly_chart") if "heatmap" in json.dumps(f := json.loads(c.proto.spec))
    )
    cells = {(a, b): says for trace in figure["data"] for a, b, says in trace.get("customdata", [])}
    assert len(cells) == 6  # both halves
    assert "Blocks 1 and 2 stand in for each other" in cells[2, 1]
    assert "removing both costs 0.3 nats more" in cells[1, 2]
    assert "(0.5 against 0.2 nats)" in cells[1, 2]
    assert "go well together" in cells[1, 3]
    assert "independent" in cells[2, 3]
    assert figure["data"][0]["z"] == [[None, 0.3, -0.1], [0.3, None, 0.01], [-0.1, 0.01, None]]
    assert any("Stand in for each other most: 1 and 2 (+0.3)" in m.value for m in at.markdown)


def test_a_resumed_search_shows_its_last_attempt(searched):
    path = searched / ".run" / "metrics.jsonl"
    again = [Found("one-shot", 2, 12, 0.5), Found("greedy", 2, 18, 0.2)]
    path.write_text("".join(json.dumps(o.__dict__) + "\n" for o in (*again, *again)))
    assert found_so_far(searched) == again
    figure = charts.best_curve(found_so_far(searched), "kl")
    line = next(t for t in figure.data if t.mode == "lines+text")
    assert (list(line.x), list(line.y)) == (pytest.approx([12, 18, 18.36]), [0.5, 0.2, 0.2])
    assert known.searches(workspace.Workspace(searched.parent), SimpleNamespace(key="")) == []


def test_whether_the_text_matters_more_than_the_method(tmp_path):
    """Methods differ in a third of a set; on the other text, each chooses two thirds others."""
    tables = {"here": {"greedy": "1 2 3", "pairs": "1 2 4"},
              "there": {"greedy": "1 5 6", "pairs": "1 5 4"},
              "same": {"greedy": "7 8 9", "pairs": "7 8 9"}}  # fmt: skip
    for name, sets in tables.items():
        files = Files(tmp_path / name)
        files.folder.mkdir()
        text = "a" if name != "there" else "b"
        files.write_json("summary.json", {"checkpoint_key": "k", "calibration_content": text,
                                          "calibration": f"/x/{name}.txt"})  # fmt: skip
        SetRow.write(files, [row(method, drop, 0.3, 3) for method, drop in sets.items()])
    here, there, same = (tmp_path / name for name in tables)
    found = spread(here, there)
    assert (found.methods, found.texts) == pytest.approx((1 / 3, (2 / 3 + 1 / 3) / 2))
    assert "the same method on there.txt chooses 50% other blocks" in (
        of_texts(here, [same, there]).sentence
    )
    assert spread(here, same) is None  # the same text
    for other in ({"heal": "refit"}, {"objective": "nll"}, {"protect_first": 2}):
        about = json.loads((there / "summary.json").read_text())
        Files(there).write_json("summary.json", {**about, **other})
        assert spread(here, there) is None  # not only the text differs
        Files(there).write_json("summary.json", about)
    close = Files(tmp_path / "close")
    close.folder.mkdir()
    close.write_json("summary.json", {"checkpoint_key": "k", "calibration_content": "c"})
    SetRow.write(close, [row("greedy", "1 2 3", 0.3, 3)])
    assert of_texts(here, [close.folder]) is None  # the same set
