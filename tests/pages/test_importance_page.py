"""The Importance page launches one run for two clicks, shows it, and offers its tables."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.charts import importance as charts
from core.checkpoint import locate
from core.prune import imported
from core.runs.device_lock import DeviceLock
from core.runs.workspace import Workspace, read_run
from core.study import store

APP = str(Path(__file__).parents[2] / "app.py")
ARGUMENTS = ["--samples", "4", "--length", "24", "--metrics", "ppl,magnitude"]


@pytest.fixture
def text(tmp_path):
    """Calibration rows as exact token ids."""
    path = tmp_path / "rows.jsonl"
    rows = [{"input_ids": [(7 * r + i) % 300 for i in range(24)]} for r in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def open_page(folder, **query) -> AppTest:
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/importance.py")
    for name, value in {"model": str(folder), **query}.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception, page.exception
    return page


def score(where, folder, text, name, *more):
    """Make an importance run with the command line."""
    out = where.root / name
    done = main(
        ["importance", str(folder), "--out", str(out), "--calibration", str(text)]
        + [*ARGUMENTS, "--device", "cpu", *more]
    )
    assert done == 0
    return out


def widget(found, start):
    return next(w for w in found if w.label.startswith(start))


def bars(page) -> list[float]:
    """Return the heights of the page's first chart as the browser would get them."""
    return values_of(json.loads(page.get("plotly_chart")[0].proto.spec)["data"][0]["y"])


def values_of(values):
    """Return numbers of a figure, which may be packed."""
    import base64

    import numpy as np

    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
    return values


@pytest.mark.usefixtures("prepared_runs")
def test_two_clicks_start_one_run_whose_results_are_shown(here, tiny_gqa, text, monkeypatch):
    page = open_page(tiny_gqa)
    widget(page.text_input, "Calibration").set_value(str(text)).run()
    widget(page.number_input, "Samples").set_value(4).run()
    widget(page.number_input, "Length").set_value(24).run()
    commands = [c.value for c in page.code if "importance" in c.value]
    assert f"--calibration {text} --samples 4 --length 24" in commands[0]

    ahead = DeviceLock("cpu")  # so that the run lives until both clicks have come
    ahead.acquire()
    widget(page.button, "Score the blocks").click().run()
    assert widget(page.button, "Score the blocks").disabled
    # A browser's fast second click comes with the button as it was drawn before the first.
    widget(page.button, "Score the blocks")._value = True
    page.run()
    (record,) = here.runs()
    ahead.release()
    deadline = time.monotonic() + 90
    while (record := read_run(record.path)).is_live and time.monotonic() < deadline:
        time.sleep(0.2)
    assert record.state == "done", record.log_tail(20)
    assert record.spec["calibration"] == str(text)
    assert (record.spec["samples"], record.spec["length"]) == (4, 24)

    page.run()
    assert len(here.runs()) == 1
    assert page.query_params["run"] in (record.id, [record.id])
    with (record.path / "blocks.csv").open() as file:
        expected = [float(row["ppl"]) for row in csv.DictReader(file)]
    assert bars(page) == pytest.approx(expected, rel=1e-9)


def test_past_runs_are_chosen_by_the_address_and_by_hand(here, tiny_gqa, text):
    first = score(here, tiny_gqa, text, "first")
    second = score(here, tiny_gqa, text, "second", "--seed", "7", "--samples", "3")
    expected = {p.name: pd.read_csv(p / "blocks.csv")["ppl"].tolist() for p in (first, second)}
    assert expected["first"] != expected["second"]

    page = open_page(tiny_gqa, run="first")
    assert bars(page) == pytest.approx(expected["first"])
    captions = " ".join(c.value for c in page.caption)
    assert "rows.jsonl, 4 x 24 tokens, seed 1234, cpu, float32" in captions
    widget(page.selectbox, "Results of").set_value("second").run()
    assert bars(page) == pytest.approx(expected["second"])
    assert page.query_params["run"] in ("second", ["second"])
    assert "3 x 24 tokens, seed 7" in " ".join(c.value for c in page.caption)


def test_what_was_not_measured_is_not_drawn(here, tiny_gqa, text):
    out = score(here, tiny_gqa, text, "only", "--metrics", "magnitude")
    page = open_page(tiny_gqa, run="only")
    titles = [t.value for t in page.subheader]
    assert "Magnitude by module" in titles
    assert "Perplexity without each block" not in titles
    assert "Angular distance" not in titles
    blocks = pd.read_csv(out / "blocks.csv")
    assert charts.scored_columns(blocks) == ["magnitude"]


def test_no_metric_is_refused(here, tiny_gqa):
    page = open_page(tiny_gqa)
    widget(page.get("button_group"), "Metrics").set_value([]).run()
    assert any("at least one metric" in e.value for e in page.error)
    assert widget(page.button, "Score the blocks").disabled
    assert here.runs() == []


def test_settings_used_again_are_seen_and_stay_so(here, tiny_gqa, text):
    out = score(here, tiny_gqa, text, "first")
    page = open_page(tiny_gqa)
    assert not widget(page.expander, "New run").proto.expanded  # there are results to look at
    page.switch_page("pages/jobs.py").run()
    assert "Use settings again" in [link.proto.label for link in page.get("page_link")]
    page.query_params["again"] = "first"  # as this link does
    page.switch_page("pages/importance.py").run()
    assert widget(page.expander, "New run").proto.expanded
    assert widget(page.number_input, "Samples").value == 4
    widget(page.number_input, "Samples").set_value(2).run()
    assert widget(page.expander, "New run").proto.expanded
    assert here.runs()[0].path == out


def test_a_text_is_chosen_with_one_click(here, tiny_gqa):
    page = open_page(tiny_gqa)
    offered = widget(page.get("button_group"), "Texts")
    assert offered.options[0] == "english"
    offered.set_value("C4 (needs the Hub)").run()
    assert not page.exception
    assert widget(page.text_input, "Calibration").value == "c4"
    assert any("--calibration c4" in code.value for code in page.code)


def test_a_running_runs_criteria_are_shown_as_they_are_finished(here, tiny_gqa, text, monkeypatch):
    """Each pass leaves its files behind; the page reads them while the run still runs."""
    from core.importance import command
    from core.runs import processes, workspace

    seen = []
    real = command._write

    def write(run, found):
        real(run, found)
        rows = pd.read_csv(run.dir / "blocks.csv")
        seen.append([c for c in ("magnitude", "ppl", "taylor") if rows[c].notna().all()])
        if seen[-1] == ["magnitude", "ppl"]:
            partial.append(rows["ppl"].tolist())
            for name in ("blocks.csv", "summary.json"):
                source = run.dir / name
                if source.is_file():
                    kept[name] = source.read_bytes()

    kept, partial = {}, []
    monkeypatch.setattr(command, "_write", write)
    out = score(here, tiny_gqa, text, "whole", "--metrics", "ppl,taylor,magnitude")
    assert seen[:2] == [["magnitude"], ["magnitude", "ppl"]]
    assert seen[-1] == ["magnitude", "ppl", "taylor"]
    final = pd.read_csv(out / "blocks.csv")["ppl"].tolist()
    assert partial == [pytest.approx(final)]

    # the same files in the folder of a run that is still going on
    running = here.root / "importance-live"
    (running / ".run").mkdir(parents=True)
    for name, content in kept.items():
        (running / name).write_bytes(content)
    spec = {"command": "importance", "spec": {"checkpoint": str(tiny_gqa), "out": str(running)}}
    workspace.write_json(running / ".run" / "spec.json", spec)
    status = read_run(out).status
    runner = subprocess.Popen(["sleep", "60"], start_new_session=True)  # killed with its run
    now = {**status, "state": "running", "finished": None, "pid": runner.pid}
    now |= {"pid_started": processes.start_time(runner.pid)}
    now.pop("inode", None)
    workspace.write_json(running / ".run" / "status.json", now)
    shutil.rmtree(out)
    page = open_page(tiny_gqa)
    assert "Results so far" in [t.value for t in page.subheader]
    assert bars(page) == pytest.approx(final)
    line = next(c.value for c in page.caption if "Still to come" in c.value)
    finished, rest = line.split("Still to come")
    assert "perplexity without it" in finished
    assert "magnitude" in finished
    assert "Taylor" in rest


def test_imported_scores_are_shown_and_rank_blocks(tiny_gqa, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    where = Workspace()
    blocks = locate.open(str(tiny_gqa)).info.blocks
    rows = "".join(f"{b},{(b * 3) % blocks}\n" for b in range(blocks))
    study = store.of(str(tiny_gqa), where).key
    imported.keep("taylor.csv", f"block,score\n{rows}".encode(), "taylor", blocks, where, study)
    at = AppTest.from_file(APP, default_timeout=90).switch_page("pages/importance.py")
    at.query_params["model"] = str(tiny_gqa)
    at.run()
    assert not at.exception, at.exception
    assert any("Imported from taylor.csv: measured elsewhere" in c.value for c in at.caption)
    at.switch_page("pages/prune.py").run()
    assert not at.exception, at.exception
    picker = next(s for s in at.selectbox if s.label == "Scores")
    assert picker.options == ["imported: taylor.csv"]
    assert "Taylor" in next(s for s in at.selectbox if s.label == "Criterion").options


def test_kl_has_bars_a_heatmap_and_its_certainty(here, tiny_gqa, text):
    out = score(here, tiny_gqa, text, "scores", "--metrics", "kl")
    page = open_page(tiny_gqa)
    titles = [title.value for title in page.subheader]
    assert "KL from the dense model without each block" in titles
    assert "Perplexity without each block" not in titles
    with (out / "blocks.csv").open() as file:
        wanted = [float(row["kl"]) for row in csv.DictReader(file)]
    with (out / "divergences.csv").open() as file:
        rows = [(int(r["block"]), int(r["sample"]), float(r["kl"])) for r in csv.DictReader(file)]
    for block, kl in enumerate(wanted):  # all rows have the same length
        each = [value for at, _, value in rows if at == block]
        assert len(each) == 4
        assert sum(each) / 4 == pytest.approx(kl)
    maps = [json.loads(c.proto.spec)["data"][0] for c in page.get("plotly_chart")]
    (kl,) = [one for one in maps if one["type"] == "bar"]
    assert values_of(kl["y"]) == pytest.approx(wanted)
    (heat,) = [one for one in maps if "nats<extra>" in one.get("hovertemplate", "")]
    assert values_of(heat["z"])[2][1] == pytest.approx(
        next(v for b, s, v in rows if (b, s) == (2, 1))
    )
