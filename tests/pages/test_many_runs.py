"""Pages of a workspace with many runs: one page of a list, and nothing read twice."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from bench import many_runs
from core.runs.workspace import Workspace

ROOT = Path(__file__).parents[2]
RUNS = 200


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    many_runs.fill(folder, RUNS, live=2)
    return folder


def open_page(name, root, monkeypatch, **query):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(root))
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.switch_page(f"pages/{name}.py")
    for key, value in {"model": "demo", **query}.items():
        at.query_params[key] = value
    at.run()
    assert not at.exception, at.exception
    return at


def test_the_invented_runs_are_a_workspace(root):
    runs = Workspace(root).runs()
    assert len(runs) == RUNS
    assert {r.state for r in runs} == {"done", "failed", "cancelled", "lost", "running"}
    assert {r.command for r in runs} == set(many_runs.CYCLE)


@pytest.mark.parametrize("name", ["jobs", "compare", "evaluate", "presentation", "retrain"])
def test_a_redraw_opens_no_file_of_an_unchanged_run(name, root, monkeypatch, opened):
    at = open_page(name, root, monkeypatch)
    opened.clear()
    at.run()
    inside = {p for p in opened if p.startswith(str(root)) and not p.endswith("active.json")}
    shown = {Path(p).parts[len(root.parts)] for p in inside}
    assert len(shown) <= (0 if name == "jobs" else 1), shown  # the run that the page is about


def test_evaluated_checkpoints_are_side_by_side_a_page_at_a_time(root, monkeypatch):
    first, last = (open_page("evaluate", root, monkeypatch, page=p) for p in ("1", "99"))
    columns = [list(at.dataframe[0].value.columns) for at in (first, last)]
    assert all(1 < len(found) <= 26 for found in columns)
    assert columns[0][:2] == columns[1][:2] == ["", "demo"]
    assert not set(columns[0][2:]) & set(columns[1][2:])
    assert last.query_params["page"] in ("2", ["2"])


def test_no_draw_ends_with_a_walk_through_all_memory():
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert config["runner"]["postScriptGC"] is False


def test_the_first_page_has_the_study_read_in_advance(root, monkeypatch, opened):
    from core import study
    from core.runs import warm

    asked = []
    monkeypatch.setattr(warm, "later", lambda seconds, *what: asked.append(what))
    monkeypatch.setattr(warm, "keep", lambda: None)
    monkeypatch.setattr(study, "_kept", {})
    open_page("jobs", root, monkeypatch)
    for do, *arguments in asked:
        do(*arguments)
    opened.clear()
    open_page("compare", root, monkeypatch)
    results = [
        p for p in opened if p.startswith(str(root)) and p.endswith((".csv", "summary.json"))
    ]
    assert not results
