"""The Jobs page without a browser: states, actions and the tree of variants."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.runs import processes, workspace
from core.runs.workspace import Workspace, read_run
from core.words import size

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
    workspace.write_json(folder / ".run" / "name.json", {"name": name})
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
    assert labels(at, "_alive") == {"Cancel", "Star"}
    assert "Restart" in labels(at, "_gone")
    assert any("again=gone" in link.proto.query_string for link in at.get("page_link"))
    assert not at.code  # logs and commands are drawn once they are opened
    at.session_state["details_gone"] = True
    at.run()
    assert any("first line of gone" in c.value for c in at.code)
    assert {b.key for b in at.get("download_button")} == {"log_gone", "spec_gone"}


def test_cancel_asks_the_run_to_stop(root):
    folder = make(root, "alive", state="running", **processes.identity())
    at = open_page()
    at.button(key="cancel_alive").click().run()
    assert (folder / ".run" / "cancel").exists()
    assert labels(at, "_alive") == {"Kill now", "Star"}


def test_rename_and_safe_deletion(root):
    make(root, "scores", state="done", finished=time.time())
    child = make(
        root, "curve", "curve", {"scores": str(root / "scores")}, state="done", finished=time.time()
    )
    at = open_page()
    assert not [b for b in at.button if b.key == "rename_run_scores"]  # drawn once it is opened
    for name in ("scores", "curve"):
        at.session_state[f"manage_run_{name}"] = True
    at.run()
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


def names_shown(at):
    """The runs of the list, in order, by the buttons that only a card has."""
    return [b.key.removeprefix("star_") for b in at.button if (b.key or "").startswith("star_")]


def many(root, count):
    for number in range(count):
        state = "failed" if number % 10 == 0 else "done"
        make(root, f"run-{number:03d}", state=state, created=1000.0 + number, finished=2000.0)


def open_page_of(**query):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.switch_page("pages/jobs.py")
    for name, value in query.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception, at.exception
    return at


def test_a_long_list_is_shown_a_page_at_a_time(root):
    many(root, 60)
    at = open_page_of()
    assert names_shown(at) == [f"run-{n:03d}" for n in range(59, 34, -1)]
    assert "1 to 25 of 60 runs" in text_of(at)
    at.get("pagination")[0].select(2).run()
    assert names_shown(at) == [f"run-{n:03d}" for n in range(34, 9, -1)]
    assert at.query_params["page"] in ("2", ["2"])
    again = open_page_of(page="2")
    assert names_shown(again) == names_shown(at)
    at.get("pagination")[0].select(3).run()
    at.run()
    assert names_shown(at) == [f"run-{n:03d}" for n in range(9, -1, -1)]
    at.get("pagination")[0].select(1).run()
    assert names_shown(at)[0] == "run-059"
    assert "page" not in at.query_params


@pytest.mark.parametrize(
    ("asked", "page"), [("99", 3), ("0", 1), ("-1", 1), ("x", 1), ("9" * 40, 3), ("²", 1)]
)
def test_a_page_that_does_not_exist_is_the_nearest(root, asked, page):
    many(root, 60)
    at = open_page_of(page=asked)
    last = {1: 59, 3: 9}[page]
    assert names_shown(at)[0] == f"run-{last:03d}"
    assert at.query_params.get("page", "1") in (str(page), [str(page)])


def test_a_filter_leaves_no_page_without_runs(root):
    many(root, 60)
    at = open_page_of(page="3")
    at.get("button_group")[0].set_value(["failed"]).run()
    assert names_shown(at) == [f"run-{n:03d}" for n in (50, 40, 30, 20, 10, 0)]
    assert "page" not in at.query_params


def test_a_run_in_the_url_comes_first_on_every_page(root):
    many(root, 60)
    at = open_page_of(page="2", run="run-059")
    assert names_shown(at)[:2] == ["run-059", "run-033"]


def test_a_changed_state_is_shown_at_the_next_draw(root, opened):
    many(root, 30)
    at = open_page_of()
    opened.clear()
    at.run()
    again = [p for p in opened if p.startswith(str(root)) and not p.endswith("log.txt")]
    assert again == []
    status = root / "run-029" / ".run" / "status.json"
    workspace.write_json(status, {"state": "failed", "created": 1029.0, "error": "Disk full."})
    at.run()
    assert "Disk full." in text_of(at)


def test_variants_are_shown_a_page_at_a_time(root, tiny_gqa):
    for number in range(30):
        cut = make(root, f"cut-{number:02d}", "prune", {"checkpoint": str(tiny_gqa)}, state="done",
                   created=1000.0 + number)  # fmt: skip
        workspace.write_json(cut / "pruning.json", {"source": str(tiny_gqa), "dropped": [1]})
    at = open_page_of(variants="2")
    rows = [m.value for m in at.markdown if "└─ **cut" in m.value]
    assert [row.split("**")[1].replace("\\", "") for row in rows] == [
        f"cut-{n:02d}" for n in range(24, 30)
    ]
    assert "26 to 31 of 31 checkpoints" in text_of(at)


def test_kept_distributions_are_shown_and_deleted(root):
    kept = root / "teachers" / "0123" / "part-00000.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(3_000_000))
    at = open_page()
    assert "keeps one set" in text_of(at)
    assert size(3_000_000) in text_of(at)
    at.button(key="delete_teachers").click().run()
    assert not kept.parent.parent.exists()
    assert "distributions" not in text_of(at)
