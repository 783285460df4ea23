"""Forms that are rarely used are drawn only while they are open, but a run of theirs is shown."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

from core.runs import workspace

ROOT = Path(__file__).resolve().parents[2]


def open_page(model, *forms):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.query_params["model"] = str(model)
    for form in forms:
        at.session_state[form] = True
    at.switch_page("pages/prune.py").run()
    assert not at.exception, at.exception
    return at


def test_a_closed_form_draws_nothing_and_an_open_one_all_of_it(tmp_path, monkeypatch, tiny_gqa):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    keys = {"search_start", "budget_start"}
    closed = open_page(tiny_gqa)
    assert not keys & {b.key for b in closed.button}
    assert not [g for g in closed.button_group if (g.key or "").startswith("pad_mlp")]
    opened = open_page(tiny_gqa, "search_form", "budget_form", "parts_form")
    assert keys <= {b.key for b in opened.button}
    assert [g for g in opened.button_group if (g.key or "").startswith("pad_mlp")]


def test_a_failed_run_that_was_started_here_is_shown_beside_the_closed_form(
    tmp_path, monkeypatch, tiny_gqa
):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    folder = tmp_path / "versions" / ".run"
    folder.mkdir(parents=True)
    spec = {"checkpoint": str(tiny_gqa), "out": str(folder.parent)}
    workspace.write_json(folder / "spec.json", {"command": "budget", "spec": spec})
    state = {"state": "failed", "created": 1.0, "error": "It broke."}
    workspace.write_json(folder / "status.json", state)
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.query_params["model"] = str(tiny_gqa)
    at.session_state["budget_run"] = "versions"
    at.switch_page("pages/prune.py").run()
    assert any("It broke." in e.value for e in at.error)
