"""Places on pages: described on the home page, chosen in forms, shown on the Jobs page."""

from __future__ import annotations

import time
from pathlib import Path

from run_helpers import wait_for
from streamlit.testing.v1 import AppTest

from core.places import place as place_file
from core.runs import processes, workspace

ROOT = Path(__file__).parents[2]
CLOSED = {"kind": "ssh", "host": "127.0.0.1", "port": 1}


def open_page(page="app.py", model=""):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    if model:
        at.query_params["model"] = model
    if page != "app.py":
        at.switch_page(page)
    at.run()
    assert not at.exception, at.exception
    return at


def text_of(at):
    kinds = (at.markdown, at.caption, at.warning, at.error, at.info, at.success, at.code)
    return "\n".join(e.value for kind in kinds for e in kind)


def widget(elements, start):
    return next(e for e in elements if (e.key or "").startswith(start))


def put(root, **places):
    place_file.save({n: place_file.from_dict(n, v) for n, v in places.items()}, root)


def test_a_place_is_added_changed_and_removed_on_the_home_page(here):
    at = open_page()
    widget(at.text_input, "place_name").set_value("box")
    widget(at.text_input, "place_host").set_value("no good host")
    widget(at.button, "place_save").click().run()
    assert "Place box: host: invalid value 'no good host'" in text_of(at)
    assert place_file.read(here.root) == {}
    widget(at.text_input, "place_host").set_value("gpu.example")
    widget(at.text_area, "place_environment").set_value("HF_HOME=/scratch/hf\n")
    widget(at.button, "place_save").click().run()
    box = place_file.read(here.root)["box"]
    assert (box.host, box.environment) == ("gpu.example", {"HF_HOME": "/scratch/hf"})
    assert "gpu.example over SSH" in text_of(at)
    at.selectbox(key="place_which").set_value("box").run()
    widget(at.radio, "place_kind").set_value("slurm").run()
    widget(at.text_input, "place_partition").set_value("gpu")
    widget(at.button, "place_save").click().run()
    assert place_file.read(here.root)["box"].partition == "gpu"
    assert "SLURM at gpu.example (partition gpu)" in text_of(at)
    at.button(key="remove_place_box").click().run()
    assert place_file.read(here.root) == {}


def test_a_test_of_a_place_says_what_is_wrong(here):
    put(here.root, box=CLOSED)
    at = open_page()
    at.button(key="test_place_box").click().run()
    deadline = time.monotonic() + 60
    while "cannot be reached" not in text_of(at):
        assert time.monotonic() < deadline
        time.sleep(0.5)
        at.run()
    assert "box (127.0.0.1, port 1) cannot be reached" in text_of(at)


def test_a_form_offers_places_and_launches_there(here):
    page = "pages/importance.py"
    assert not [s for s in open_page(page, "demo").selectbox if s.label == "Run on"]
    put(here.root, box=CLOSED, farm={"kind": "slurm", "partition": "gpu"})
    at = open_page(page, "demo")
    chosen = next(s for s in at.selectbox if s.label == "Run on")
    assert chosen.options == ["this machine", "box", "farm"]
    chosen.set_value("farm").run()
    next(n for n in at.number_input if n.label == "GPUs").set_value(2).run()
    assert "--on farm --gpus 2" in text_of(at)
    next(s for s in at.selectbox if s.label == "Run on").set_value("box").run()
    assert "--on box" in text_of(at)
    assert "--gpus" not in text_of(at)
    at.button(key="importance_start").click().run()
    record = here.runs("importance")[0]
    assert record.on == {"place": "box"}
    failed = wait_for(record, "failed")
    assert "cannot be reached" in failed.error
    again = open_page(page, "demo")  # the choice is kept
    assert next(s for s in again.selectbox if s.label == "Run on").value == "box"


def test_the_jobs_page_shows_where_a_run_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    alive = processes.identity()

    def make(name, facts=None, **status):
        book = tmp_path / name / ".run"
        book.mkdir(parents=True)
        spec = {"command": "importance", "spec": {"checkpoint": "demo"}, "argv": []}
        if facts is not None:
            spec["on"] = {"place": "farm"}
            workspace.write_json(book / "place.json", facts)
        workspace.write_json(book / "spec.json", spec)
        workspace.write_json(book / "status.json", {"created": time.time(), **alive, **status})
        workspace.write_json(book / "name.json", {"name": name})

    waiting = "Job 12 waits in SLURM's queue: Resources (the nodes are busy)."
    make("pending", {"job": "12", "waiting": waiting}, state="queued")
    make("far", {"job": "11", "node": "n7", "trouble": "farm cannot be reached."}, state="running",
         device="cuda:0")  # fmt: skip
    make("gone", {"job": "9"}, state="running", pid_started=-1.0)
    make("near", state="done", finished=time.time())
    at = open_page("pages/jobs.py")
    text = text_of(at)
    assert waiting in text
    assert "on cuda:0 · at farm (n7, job 11)" in text
    assert "farm cannot be reached. The run is not affected; trying again." in text
    assert "restart it to follow it again" in text
    at.multiselect(key="jobs_places").set_value(["this machine"]).run()
    text = text_of(at)
    assert "near" in text
    assert "job 11" not in text


def test_processes_are_asked_for_where_there_can_be_several_gpus(here, monkeypatch):
    """With a second GPU, or with a place that may have some; one process unless changed."""
    from core.runs import devices

    def field():
        found = open_page("pages/importance.py", "demo").number_input
        return next((e for e in found if e.label == "Processes"), None)

    assert field() is None
    with monkeypatch.context() as patch:
        patch.setattr(devices, "gpu_names", lambda: ("cuda:0", "cuda:1"))
        assert field().value == 1
    put(here.root, box=CLOSED)
    at = open_page("pages/importance.py", "demo")
    processes_field = next(e for e in at.number_input if e.label == "Processes")
    processes_field.set_value(2).run()
    assert "--processes 2" in text_of(at)


def test_sharding_is_asked_for_next_to_them_if_all_weights_are_trained(here, monkeypatch):
    from core.runs import devices

    monkeypatch.setattr(devices, "gpu_names", lambda: ("cuda:0", "cuda:1"))
    at = open_page("pages/retrain.py", "demo")
    assert not [e for e in at.selectbox if e.label == "Sharding"]
    next(e for e in at.selectbox if e.label == "Method").set_value("full").run()
    next(e for e in at.number_input if e.label == "Processes").set_value(2).run()
    next(e for e in at.selectbox if e.label == "Sharding").set_value("fsdp").run()
    assert "--processes 2" in text_of(at)
    assert "--sharding fsdp" in text_of(at)
