"""The study's settings on the pages: asked once, carried along, changed for one run, kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import pytest
import study_helpers as made
from streamlit.testing.v1 import AppTest

from core.checkpoint import locate
from core.runs.workspace import read_run
from core.study import store
from core.ui import again, live_panel

APP = str(Path(__file__).parents[2] / "app.py")


def open_page(model, page="") -> AppTest:
    """Open a page in a new session, as a refresh of the browser does."""
    at = AppTest.from_file(APP, default_timeout=60)
    if page:
        at.switch_page(f"pages/{page}.py")
    at.session_state["search_form"] = True  # the form is open
    at.query_params["model"] = str(model)
    at.run()
    assert not at.exception, at.exception
    return at


def command(at, name):
    return next(c.value for c in at.code if f" core {name} " in c.value)


def field(found, label):
    return next(w for w in found if w.label == label)


def origin(at):
    return next(c.value for c in at.caption if "From the study" in c.value)


def panel(at):
    return next(e for e in at.expander if e.label.startswith("Study"))


def test_settings_are_asked_once_and_carried_to_every_page(here, tiny_gqa, tmp_path):
    text = tmp_path / "held.txt"
    text.write_text("Ann sees the red ball.\n" * 40)
    home = open_page(tiny_gqa)
    assert panel(home).label == "Study: text english · no tasks · no target · device auto"
    assert panel(home).proto.expanded
    field(home.text_input, "Evaluation text").set_value(str(text)).run()
    field(home.multiselect, "Tasks").set_value(["arc_easy"]).run()
    field(home.number_input, "Smaller by (%)").set_value(20.0).run()
    field(home.text_input, "Device").set_value("cpu").run()
    assert panel(home).proto.expanded  # it does not close while it is filled in
    home.button(key="study_confirm").click().run()
    assert not panel(home).proto.expanded
    assert "evaluation held.txt · training english · tasks arc_easy" in panel(home).label
    assert "20% smaller · device cpu" in panel(home).label

    at = open_page(tiny_gqa)  # a refresh
    assert not panel(at).proto.expanded
    at.switch_page("pages/evaluate.py").run()
    shown = command(at, "evaluate")
    assert f"--perplexity {text} --tasks arc_easy" in shown
    assert "--device cpu" in shown
    at.switch_page("pages/compare.py").run()
    assert f"--ratio 0.2 --data english,{text}" in command(at, "recipe")
    at.switch_page("pages/importance.py").run()
    assert "--calibration english" in command(at, "importance")
    assert origin(at) == "From the study: calibration english, device cpu, precision auto."


def test_the_study_s_own_tasks_are_offered_and_carried(here, tiny_gqa, tmp_path):
    (tmp_path / "own.yaml").write_text("task: own_task\ncustom_dataset: !function load.load\n")
    home = open_page(tiny_gqa)
    assert not home.checkbox  # nothing could run code
    field(home.text_input, "Folder of custom tasks").set_value(str(tmp_path)).run()
    tasks = field(home.multiselect, "Tasks")
    assert tasks.options[0] == "own_task"
    tasks.set_value(["own_task"]).run()
    assert any("Task 'own_task' would run Python code" in w.value for w in home.warning)
    field(home.checkbox, "Allow these tasks to run Python code").check().run()
    assert not home.warning
    at = open_page(tiny_gqa, "evaluate")
    shown = command(at, "evaluate")
    assert f"--tasks own_task --task-dir {tmp_path} --allow-task-code" in shown
    at.query_params["drop"] = "2"
    at.switch_page("pages/prune.py").run()
    assert f"--tasks own_task --task-dir {tmp_path} --allow-task-code" in command(at, "recipe make")


def test_a_change_for_one_run_survives_and_can_be_undone(here, tiny_gqa):
    at = open_page(tiny_gqa, "importance")
    field(at.text_input, "Calibration").set_value("c4").run()
    field(at.number_input, "Samples").set_value(4).run()
    at.switch_page("pages/evaluate.py").run()
    at.multiselect(key="in_evaluate_tasks").set_value(["arc_easy", "piqa"]).run()
    at.text_input(key="in_evaluate_perplexity").set_value("english, c4").run()
    at.switch_page("pages/importance.py").run()
    for back in (at, open_page(tiny_gqa, "importance")):  # the latter as after a refresh
        assert "--calibration c4 --samples 4" in command(back, "importance")
        assert "Changed here: calibration c4, samples 4." in origin(back)
    at.switch_page("pages/evaluate.py").run()
    assert (
        "--perplexity english --perplexity c4 --max-tokens 32768 --tasks arc_easy,piqa"
        in command(at, "evaluate")
    )
    at.switch_page("pages/importance.py").run()
    at.button(key="undo_importance").click().run()
    assert "--samples" not in command(at, "importance")
    assert field(at.text_input, "Calibration").value == "english"
    assert "Changed here" not in origin(at)
    assert store.of(str(tiny_gqa), here).changed("evaluate")["tasks"] == ["arc_easy", "piqa"]


def test_a_damaged_study_is_one_sentence(here, tiny_gqa):
    kept = store.of(str(tiny_gqa), here)
    kept.path.parent.mkdir(parents=True)
    kept.path.write_text("{")
    at = open_page(tiny_gqa)
    assert [w.value for w in at.warning if "cannot be read" in w.value]
    store.save(kept.with_change("importance", {"samples": "x", "metrics": 3, "seed": -1,
                                               "calibration": [1], "join": {}}))  # fmt: skip
    shown = command(open_page(tiny_gqa, "importance"), "importance")
    assert "--samples" not in shown
    assert "--seed" not in shown


@pytest.mark.parametrize("keep", [True, False])
def test_settings_of_a_run_on_another_checkpoint_are_asked_about(here, tmp_path, tiny_gqa, keep):
    other = made.checkpoint(tmp_path / "other")
    made.run(here.root, "earlier", "importance", 1, checkpoint=other, samples=3)
    at = open_page(tiny_gqa, "jobs")
    label = "Use them for the active one" if keep else "Make its checkpoint the active one"
    link = next(p.proto for p in at.get("page_link") if p.proto.label == label)
    assert at.session_state["active_model"] == str(tiny_gqa)
    active = str(tiny_gqa if keep else other)
    assert link.query_string == urlencode({"again": "earlier", "model": active})
    for name, value in parse_qsl(link.query_string):
        at.query_params[name] = value
    at.switch_page("pages/importance.py").run()
    assert at.session_state["active_model"] == active
    assert "again" not in at.query_params
    assert f"core importance {active} --out DIR --calibration english --samples 3" in command(
        at, "importance"
    )


def test_the_checkpoints_of_a_run_are_found_again(here, tiny_gqa):
    cut = made.pruned(here.root, "cut", tiny_gqa, [1], 1, 99999)
    run = made.run(here.root, "earlier", "evaluate", 2, checkpoint=cut, limit=3)
    values = again._values(read_run(run), str(tiny_gqa))
    assert values == {"limit": 3, "checkpoints": ["cut"]}


def test_text_that_was_seen_before_is_named_where_it_is_used(here, tiny_gqa, tmp_path):
    text = tmp_path / "held.txt"
    text.write_text("Ann sees the red ball.\n" * 40)
    home = open_page(tiny_gqa)
    field(home.text_input, "Evaluation text").set_value(str(text)).run()
    at = open_page(tiny_gqa, "evaluate")
    assert not at.warning
    field(home.text_input, "Calibration text").set_value(str(text)).run()
    at.run()
    assert "held.txt is also the calibration text" in at.warning[0].value
    at = open_page(tiny_gqa, "retrain")
    assert not at.warning
    field(at.text_input, "Data").set_value(str(text)).run()
    assert "held.txt is also the training data" in at.warning[0].value


def test_a_search_starts_around_the_study_s_target(here, tiny_gqa):
    home = open_page(tiny_gqa)
    field(home.number_input, "Smaller by (%)").set_value(20.0).run()
    at = open_page(tiny_gqa, "prune")
    counts = field(at.text_input, "Numbers of blocks to remove").value
    info = locate.open(str(tiny_gqa)).info
    low, _, high = counts.partition("-")
    share = [int(n) * info.block_parameters[0] / info.parameters for n in (low, high or low)]
    assert share[0] <= 0.2 <= share[1]
    assert f"--counts {low}" in command(at, "search")


def test_live_figures_are_asked_for_on_the_study_s_device(here, tiny_gqa):
    assert live_panel.on(str(tiny_gqa)) == {}
    kept = store.of(str(tiny_gqa), here)
    asked = dataclasses.replace(kept.settings, device="cpu", dtype="float32")
    store.save(dataclasses.replace(kept, settings=asked, asked=True))
    assert live_panel.on(str(tiny_gqa)) == {"device": "cpu", "dtype": "float32"}
