"""The Evaluate page: its table is the runs' files, stale results are left out, flips have words."""

from __future__ import annotations

import base64
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.evaluate.results import BlockCost, read_samples
from core.runs import jobs
from core.runs.workspace import Workspace, read_run

APP = str(Path(__file__).parents[2] / "app.py")
LOCAL = """
task: things
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: options
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def evaluated(tiny_dir, tmp_path_factory):
    """A workspace with a dense checkpoint and a pruned one, both evaluated by the command line."""
    root = tmp_path_factory.mktemp("evaluate")
    where, tasks, text = root / "workspace", root / "tasks", root / "text.txt"
    dense = root / "dense"
    shutil.copytree(tiny_dir("gqa"), dense)
    text.write_text(tiny.text(60))
    tasks.mkdir()
    draw = random.Random(1)
    words = [
        "ball",
        "boat",
        "cup",
        "book",
        "coat",
        "garden",
        "river",
        "home",
        "hill",
        "red",
        "blue",
        "old",
        "warm",
    ]
    rows = [
        {
            "question": f"{name} {verb} the",
            "options": [f" {word}" for word in draw.sample(words, 3)],
            "answer": draw.randrange(3),
        }
        for name in ("Ann", "Ben", "Cora", "Dan")
        for verb in ("sees", "finds", "takes", "wants")
    ]
    data = tasks / "things.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "things.yaml").write_text(LOCAL.format(data=data))
    patch = pytest.MonkeyPatch()
    patch.setenv("DEPTHCUT_LOCK_DIR", str(root / "locks"))
    patch.setenv("DEPTHCUT_WORKSPACE", str(where))
    patch.setenv("HF_HOME", str(root / "hf"))
    options = ["--perplexity", text, "--window", "32", "--tasks", "things", "--task-dir", tasks]
    for argv in (
        ["prune", dense, "--drop", "0,2,3", "--out", where / "small"],
        ["evaluate", dense, *options, "--each-block", "--out", where / "on-dense"],
        ["evaluate", where / "small", *options, "--out", where / "on-small"],
    ):
        assert main([str(a) for a in argv]) == 0
    yield where, dense, text, tasks
    patch.undo()


@pytest.fixture
def here(evaluated, tmp_path, monkeypatch):
    """A copy of the workspace for one test."""
    where, dense, text, tasks = evaluated
    shutil.rmtree(where / "studies", ignore_errors=True)
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(where))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield Workspace(where), dense, text, tasks
    for record in Workspace(where).runs():
        if record.is_live:
            jobs.LocalLauncher().kill(record)


def open_page(folder) -> AppTest:
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/evaluate.py")
    page.query_params["model"] = str(folder)
    page.run()
    assert not page.exception, page.exception
    return page


def widget(found, start):
    return next(w for w in found if w.label.startswith(start))


def decoded(values):
    if isinstance(values, dict):
        array = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
        shape = values.get("shape")
        return (array.reshape([int(n) for n in shape.split(",")]) if shape else array).tolist()
    return values


def chart(page, kind):
    """Return the first trace of this kind on the page."""
    specs = [json.loads(figure.proto.spec) for figure in page.get("plotly_chart")]
    return next(t for s in specs for t in s["data"] if t["type"] == kind)


def beside(values: dict[str, float]) -> str:
    """Return how the table begins the small model's cell: value and change."""
    return f"{values['on-small']:.3f} ({values['on-small'] - values['on-dense']:+.3f}"


def test_a_long_text_is_capped_and_the_page_says_so(here, tmp_path):
    _, dense, *_ = here
    long = tmp_path / "long.txt"
    long.write_text(tiny.text(9000, seed=3))
    page = open_page(dense)
    widget(page.text_input, "Perplexity of").set_value(str(long)).run()
    line = next(c.value for c in page.code if "core evaluate" in c.value)
    assert "--max-tokens 32768" in line
    assert any("the first 32,768 tokens of each text (256 windows)" in c.value
               for c in page.caption)  # fmt: skip
    widget(page.selectbox, "Part of each text").set_value(0).run()
    assert "--max-tokens" not in next(c.value for c in page.code if "core evaluate" in c.value)
    long.write_text(tiny.text(20, seed=3))
    widget(page.selectbox, "Part of each text").set_value(32_768).run()
    assert "--max-tokens" not in next(c.value for c in page.code if "core evaluate" in c.value)


def test_the_table_is_what_the_runs_hold(here):
    where, dense, *_ = here
    page = open_page(dense)
    table = page.dataframe[0].value
    files = {
        name: [pd.read_csv(where.root / name / f"{f}.csv") for f in ("perplexity", "tasks")]
        for name in ("on-dense", "on-small")
    }
    label = "without 0, 2 to 3"
    columns = list(table.columns)
    small = next(c for c in columns if c.startswith(label))
    first = next(c for c in columns if c not in ("", small))
    ppl = {name: f[0]["ppl"][0] for name, f in files.items()}
    acc = {name: f[1]["value"][0] for name, f in files.items()}
    assert table[first][0].startswith(f"{ppl['on-dense']:.3f}")
    assert table[small][0].startswith(
        f"{ppl['on-small']:.3f} ({ppl['on-small'] - ppl['on-dense']:+.3f}"
    )
    assert table[first][1].startswith(f"{acc['on-dense']:.3f} ± ")
    assert table[small][1].startswith(
        f"{acc['on-small']:.3f} ({acc['on-small'] - acc['on-dense']:+.3f}"
    )
    dots = chart(page, "scatter")
    assert decoded(dots["x"]) == pytest.approx([acc["on-dense"]])
    captions = " ".join(c.value for c in page.caption)
    assert "Measured on cpu in float32, 2 runs." in captions


def test_the_heatmap_is_the_skills_file(here):
    where, dense, *_ = here
    rows = BlockCost.read(where.root / "on-dense")
    drawn = decoded(chart(open_page(dense), "heatmap")["z"])
    assert drawn == [pytest.approx([r.delta for r in rows if r.block >= 0])]
    assert len(drawn[0]) == tiny.BLOCKS


def test_flips_have_the_questions_words(here):
    where, dense, *_ = here
    samples = [read_samples(where.root / n) for n in ("on-dense", "on-small")]
    flipped = [a.question for a, b in zip(*samples, strict=True) if a.metrics != b.metrics]
    page = open_page(dense)
    texts = [t.value for t in page.text]
    assert flipped, "the two tiny models answer alike: choose other blocks"
    for question in flipped:
        assert question in texts
    sentence = next(m.value for m in page.markdown if "exact sign test" in m.value)
    lost = sum(a.metrics["acc"] > b.metrics["acc"] for a, b in zip(*samples, strict=True))
    assert f"loses {lost} questions" in sentence
    assert f"gains {len(flipped) - lost};" in sentence


def test_results_of_changed_weights_are_not_shown(here, tmp_path):
    where, dense, *_ = here
    file = next(dense.glob("*.safetensors"))
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-4] + bytes([1, 2, 3, 60]))
        page = open_page(dense)
        table = page.dataframe[0].value
        first = next(c for c in table.columns if c and not c.startswith("without"))
        assert set(table[first]) == {"not measured"}
        with pytest.raises(StopIteration):
            chart(page, "heatmap")
    finally:
        file.write_bytes(before)


@pytest.mark.usefixtures("prepared_runs")
def test_one_click_starts_one_run_a_checkpoint(here):
    where, dense, text, tasks = here
    page = open_page(dense)
    widget(page.text_input, "Perplexity").set_value(str(text)).run()
    widget(page.text_input, "Window").set_value("16").run()
    box = widget(page.multiselect, "Checkpoints")
    box.set_value(["small", box.value[0]]).run()
    lines = next(c.value for c in page.code if "evaluate" in c.value)
    assert lines.count(f"--perplexity {text} --window 16") == 2
    assert any("Estimated:" in c.value and "GFLOP" in c.value for c in page.caption)
    before = len(where.runs("evaluate"))
    widget(page.button, "Evaluate").click().run()
    started = where.runs("evaluate")[: len(where.runs("evaluate")) - before]
    assert len(started) == 2
    deadline = time.monotonic() + 120
    while any(read_run(s.path).is_live for s in started) and time.monotonic() < deadline:
        time.sleep(0.3)
    ended = [read_run(s.path) for s in started]
    assert [r.state for r in ended] == ["done", "done"], [r.log_tail(5) for r in ended]
    page.run()
    names = page.dataframe[0].value[""].tolist()
    assert "perplexity of text.txt, 16 tokens" in names
    for record in ended:
        where.delete(record)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("Window", "300", "300 tokens exceed the model's context"),
        ("Window", "x", "'x' is not a whole number"),
        ("Perplexity", "nowhere.txt", "No text source 'nowhere.txt'"),
        ("Perplexity", "", "Nothing to measure."),
        ("Folder of custom", "nowhere", ""),
    ],
)
def test_what_the_command_refuses_the_page_refuses(here, field, value, sentence):
    _, dense, text, _ = here
    page = open_page(dense)
    widget(page.text_input, "Perplexity").set_value(str(text)).run()
    if sentence:
        widget(page.text_input, field).set_value(value).run()
        assert any(sentence in e.value for e in page.error)
    else:
        widget(page.multiselect, "Tasks").set_value(["paper"]).run()
        widget(page.text_input, field).set_value(value).run()
        assert any("no such folder: 'nowhere'" in e.value for e in page.error)
    assert widget(page.button, "Evaluate").disabled
