"""The Jobs page without a browser: states, actions and the tree of variants."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.runs import processes, workspace
from core.runs.workspace import Workspace, read_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    return tmp_path


def make(root, name, command="importance", spec=None, **status):
    folder = root / name
    (folder / ".run").mkdir(parents=True)
    spec = {"checkpoint": "demo", "out": str(folder), **(spec or {})}
    argv = ["python", "-m", "core", command, "demo"]
    value = {"command": command, "spec": spec, "argv": argv}
    workspace.write_json(folder / ".run" / "spec.json", value)
    workspace.write_json(folder / ".run" / "status.json", {"created": time.time(), **status})
    (folder / ".run" / "log.txt").write_text(f"10:00:00 first line of {name}\n")
    return folder


def open_page():
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.switch_page("pages/jobs.py").run()
    assert not at.exception, at.exception
    return at


def text_of(at):
    return "\n".join(e.value for e in (*at.markdown, *at.caption, *at.warning, *at.error, *at.info))


def labels(at, name):
    return {b.label for b in at.button if b.key and b.key.endswith(name)}


def test_lost_runs_are_told_from_live_ones(root):
    alive = processes.identity()
    progress = {"done": 5, "total": 16, "message": "blocks"}
    make(root, "alive", state="running", progress=progress, **alive)
    make(root, "waits", "curve", state="queued", device="cpu", waiting_for="alive", **alive)
    make(root, "gone", state="running", **{**alive, "pid_started": -1.0})
    make(root, "broken", state="failed", error="Too little text.", hint="Give more.", finished=1.0)
    at = open_page()
    text = text_of(at)
    for name, state in (
        ("alive", "running"),
        ("waits", "queued"),
        ("gone", "lost"),
        ("broken", "failed"),
    ):
        assert any(state in m.value and f"**{name}**" in m.value for m in at.markdown), name
    assert "Waiting for cpu, behind alive." in text
    assert "Too little text. Give more." in text
    assert labels(at, "_alive") == {"Cancel"}
    assert {"Restart", "Use settings again"} <= labels(at, "_gone")
    assert any("first line of gone" in c.value for c in at.code)


def test_cancel_asks_the_run_to_stop(root):
    folder = make(root, "alive", state="running", **processes.identity())
    at = open_page()
    at.button(key="cancel_alive").click().run()
    assert (folder / ".run" / "cancel").exists()
    assert labels(at, "_alive") == {"Kill now"}


def test_rename_and_safe_deletion(root):
    make(root, "scores", state="done", finished=time.time())
    child = make(
        root, "curve", "curve", {"scores": str(root / "scores")}, state="done", finished=time.time()
    )
    at = open_page()
    at.text_input(key="name_run_scores").set_value("first try").run()
    at.button(key="rename_run_scores").click().run()
    assert read_run(root / "scores").name == "first try"
    assert at.checkbox(key="sure_run_scores").disabled
    assert at.button(key="delete_run_scores").disabled
    assert "Used by 1 other run: curve. Delete those first." in text_of(at)
    assert at.button(key="delete_run_curve").disabled
    at.checkbox(key="sure_run_curve").check().run()
    at.button(key="delete_run_curve").click().run()
    assert not child.exists()
    assert [r.id for r in Workspace(root).runs()] == ["scores"]
    assert not at.checkbox(key="sure_run_scores").disabled


def test_variants_hang_below_their_source(root, tiny_gqa):
    source = {"checkpoint": str(tiny_gqa), "drop": [2]}
    folder = make(root, "cut", "prune", source, state="done", finished=time.time())
    record = {"dropped": [2], "blocks_after": 4, "parameters_after": 1234, "ratio": 0.2}
    workspace.write_json(folder / "pruning.json", record)
    (folder / "config.json").write_text("{}")
    at = open_page()
    rows = [m.value for m in at.markdown]
    dense = next(i for i, row in enumerate(rows) if f"**{tiny_gqa.name}**" in row)
    cut = next(i for i, row in enumerate(rows) if "└─ **cut**" in row)
    assert dense < cut
    assert "without 2 · 4 blocks · 1,234 parameters · 20.0% removed" in rows[cut]
    at.button(key="use_cut").click().run()
    assert at.session_state["active_model"] == "cut"


def test_two_checkpoints_of_one_name_are_told_apart(root, tiny_dir):
    one, two = tiny_dir("gqa"), tiny_dir("gqa", seed=3)
    assert one.name == two.name
    for number, folder in enumerate((one, two)):
        cut = make(root, f"cut-{number}", "prune", {"checkpoint": str(folder)}, state="done")
        workspace.write_json(cut / "pruning.json", {"source": str(folder), "dropped": [1]})
    at = open_page()
    roots = [e for e in at.markdown if "dense" in e.value and f"**{one.name}**" in e.value]
    assert {e.help for e in roots} == {str(one), str(two)}
    uses = [b for b in at.button if b.label == "Use" and str(two) in (b.key or "")]
    assert len(uses) == 1
    uses[0].click().run()
    assert not at.exception
    assert at.session_state["active_model"] == str(two)
