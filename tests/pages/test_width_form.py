"""The Width tab without a browser: figures against a dry run of the command, the launch, errors."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.checkpoint import headers
from core.importance.estimate import block_flops
from core.prune import depth
from core.runs import workspace


def script():
    import streamlit as st

    from core.checkpoint import locate
    from core.ui import width_form

    name = st.session_state["folder"]
    width_form.draw(name, locate.open(name).info)


@pytest.fixture
def form(tiny_gqa, place):
    return drawn(tiny_gqa)


def drawn(tiny_gqa):
    at = AppTest.from_function(script, default_timeout=60)
    at.session_state["folder"] = str(tiny_gqa)
    at.run()
    assert not at.exception, at.exception
    return at


def command(at):
    return next(c.value for c in at.code if " width " in c.value)


def create(at):
    return next(b for b in at.button if b.label.startswith("Create"))


def metric(at, label):
    return next(m.value for m in at.metric if m.label == label)


def dry(capsys, *arguments):
    capsys.readouterr()
    assert main(["width", *map(str, arguments), "--out", "unused", "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("method", ["llm-pruner", "wanda-sp", "flap", "random"])
def test_figures_are_those_of_the_dry_run(form, tiny_gqa, capsys, method):
    form.selectbox(key="in_width_method").set_value(method).run()
    form.slider(key="in_width_ratio").set_value(0.5).run()
    said = dry(capsys, tiny_gqa, "--method", method, "--ratio", "0.5")
    label = "Parameters left" + (" (estimated)" if said["kind"] == "estimated" else "")
    assert metric(form, label) == f"{said['parameters_after']:,}"
    expected = f"python -m core width {tiny_gqa} --method {method} --ratio 0.5 --out DIR"
    if method != "random":  # which reads no text
        expected = expected.replace(" --out", " --calibration english --out")
    assert command(form) == expected
    if method == "llm-pruner":
        table = form.table[0].value
        assert list(table.index) == ["0", "1 to 3", "4"]  # the first and the last are protected
        assert table.loc["1 to 3", "heads"] == "2 of 4"
        assert table.loc["1 to 3", "neurons"] == f"{said['blocks'][2]['neurons']} of 48"


def test_a_chat_template_can_be_switched_off(form, tiny_gqa, tmp_path):
    assert not [box for box in form.selectbox if box.label == "Chat template"]
    chat = tmp_path / "chat"
    shutil.copytree(tiny_gqa, chat)
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    form.session_state["folder"] = str(chat)
    form.run()
    assert "--chat-template" not in command(form)
    next(box for box in form.selectbox if box.label == "Chat template").set_value("off").run()
    assert "--chat-template off" in command(form)
    next(box for box in form.selectbox if box.label == "Method").set_value(
        "random"
    ).run()  # reads no text
    assert "--chat-template" not in command(form)


def test_matching_a_variant_says_how_near(form, place, tiny_gqa, capsys):
    folder = place.root / "cut"
    depth.prune(tiny_gqa, (2,), folder)
    book = folder / ".run"
    book.mkdir()
    (book / "spec.json").write_text(json.dumps({"command": "prune", "spec": {}}))
    (book / "status.json").write_text(json.dumps({"state": "done", "created": 1.0}))
    form = drawn(tiny_gqa)
    assert form.selectbox(key="in_width_amount").value == "match"  # the same size, if there is one
    wanted = headers.inspect(folder).parameters
    said = dry(capsys, tiny_gqa, "--method", "llm-pruner", "--match", folder)
    assert metric(form, "Target") == f"{wanted:,}"
    assert metric(form, "Parameters left") == f"{said['parameters_after']:,}"
    assert metric(form, "Off by") == f"{said['parameters_after'] - wanted:+,}"
    assert f"--match {folder}" in command(form)


def test_without_a_variant_there_is_nothing_to_match(form):
    form.selectbox(key="in_width_amount").set_value("match").run()
    assert form.error[0].value.startswith("There is no variant to match yet")
    assert create(form).disabled


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ("4:9", "has blocks 0 to 4"),
        ("x", "'x' is not a block or a range"),
        ("3:3", "'Blocks: 3:3' is empty"),
    ],
)
def test_layers_outside_the_model_are_one_sentence(form, layers, sentence):
    form.text_input(key="in_width_layers").set_value(layers).run()
    assert sentence in form.error[0].value
    assert create(form).disabled


def choose(at, label, value):
    next(
        w for w in (*at.selectbox, *at.text_input, *at.number_input) if w.label == label
    ).set_value(value).run()
    assert not at.exception, at.exception


def test_variants_of_llm_pruner_reach_the_command(form, tiny_gqa, capsys):
    form.slider(key="in_width_ratio").set_value(0.5).run()
    choose(form, "Taylor expansion", "vector")
    choose(form, "What to cut", "mlp")
    assert "Blocks whose attention is cut" not in [w.label for w in form.text_input]
    choose(form, "Blocks whose MLP is cut", "1,3-4")
    options = ["--parts", "mlp", "--mlp-layers", "1,3-4", "--order", "vector"]
    said = dry(capsys, tiny_gqa, "--method", "llm-pruner", "--ratio", "0.5", *options)
    assert f"--ratio 0.5 {' '.join(options)}" in command(form)
    assert metric(form, "Parameters left") == f"{said['parameters_after']:,}"
    choose(form, "Ranking", "global")
    assert "LLM-Pruner distributes the cut" in " ".join(c.value for c in form.caption)
    choose(form, "Blocks whose MLP is cut", "9")
    assert form.error[0].value.startswith("'Blocks whose MLP is cut: 9' goes beyond the model")
    assert create(form).disabled


def test_structures_of_flap_ask_for_heads_where_they_need_them(form, tiny_gqa, capsys):
    choose(form, "Method", "flap")
    form.slider(key="in_width_ratio").set_value(0.5).run()
    labels = [w.label for w in form.number_input]
    assert "Heads to remove" not in labels
    assert "Taylor expansion" not in [w.label for w in form.selectbox]
    choose(form, "Metric", "wifn")
    choose(form, "Structure", "ul-mm")
    options = ["--metric", "wifn", "--structure", "ul-mm", "--remove-heads", "5"]
    said = dry(capsys, tiny_gqa, "--method", "flap", "--ratio", "0.5", *options)
    assert " ".join(options) in command(form)
    assert metric(form, "Parameters left") == f"{said['parameters_after']:,}"
    choose(form, "Heads to remove", 4)
    assert "'Heads to remove: 4' cannot be divided evenly" in form.error[0].value
    choose(form, "Round widths to", 128)
    choose(form, "Heads to remove", 5)
    assert "'Round widths to: 128' leaves nothing to cut" in form.error[0].value


@pytest.mark.usefixtures("prepared_runs")
def test_the_button_starts_the_run_that_the_command_line_shows(form, place, tiny_gqa):
    form.selectbox(key="in_width_method").set_value("random").run()
    form.slider(key="in_width_ratio").set_value(0.5).run()
    create(form).click().run()
    (record,) = place.runs("width")
    assert record.spec["method"] == "random"
    assert record.spec["ratio"] == 0.5
    for _ in range(600):
        if not record.is_live:
            break
        time.sleep(0.2)
        (record,) = place.runs("width")
    assert record.state == "done", record.error
    form.run()
    assert any(" finished in " in s.value for s in form.success)
    info = headers.inspect(record.path)
    assert info.parameters < headers.inspect(tiny_gqa).parameters


def test_the_time_is_told_before_the_launch(form, tiny_gqa, place):
    folder, info = place.root / "scores", headers.inspect(tiny_gqa)
    form.selectbox(key="in_width_method").set_value("random").run()
    (time,) = (c.value for c in form.caption if c.value.startswith("Estimated time"))
    assert time.startswith("Estimated time: about 3 s, at an assumed rate of writing, as no ")
    (folder / ".run").mkdir(parents=True)
    spec = {"command": "importance", "spec": {"checkpoint": str(tiny_gqa)}}
    workspace.write_json(folder / ".run" / "spec.json", spec)
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    form.selectbox(key="in_width_method").set_value("wanda-sp").run()
    length = min(128, info.context)
    flops = 2 * sum(block_flops(info, b, 128, length) for b in range(info.blocks))
    rate = {"device": "cpu", "flops_per_s": flops / 60, "parameters": info.parameters}
    workspace.write_json(folder / "summary.json", rate)
    form.run()
    (time,) = (c.value for c in form.caption if c.value.startswith("Estimated time"))
    assert time == "Estimated time: about 1 min 3 s, at the rate of the last run in this workspace."


def test_healing_is_an_option_of_the_command(form, capsys, tiny_gqa):
    assert "--heal" not in command(form)
    form.selectbox(key=next(s.key for s in form.selectbox if s.label == "Heal")).set_value("refit")
    form.run()
    assert not form.exception
    assert "--heal refit" in command(form)
    rows = next(n for n in form.number_input if n.label == "Rows to heal on")
    rows.set_value(4).run()
    length = next(n for n in form.number_input if n.label == "Tokens per row")
    length.set_value(8).run()
    assert any("4 rows have 32" in e.value for e in form.error), [e.value for e in form.error]
    assert create(form).disabled
