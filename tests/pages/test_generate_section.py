"""The Retrain page lets the dense model write the training text, shows it, and trains on it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.generate.results import Summary


@pytest.fixture
def prompts(tmp_path):
    rows = [{"instruction": f"Say <b>{n}</b>", "output": f"It is {n}."} for n in range(7)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


APP = str(Path(__file__).parents[2] / "app.py")
TRAIN = "Train on this text"


def widget(found, start):
    return next(w for w in found if w.label.startswith(start))


def wait(page, true):
    """Run the page until ``true(page)``."""
    deadline = time.monotonic() + 60
    while not true(page):
        assert time.monotonic() < deadline
        time.sleep(0.3)
        page.run()
        assert not page.exception, page.exception


def html_of(page):
    return " ".join(element.proto.body for element in page.get("html"))


@pytest.mark.usefixtures("prepared_runs")
def test_the_dense_model_writes_the_training_text(here, tiny_gqa, prompts):
    out = here.root / "cut"
    assert main(["prune", str(tiny_gqa), "--drop", "1", "--out", str(out)]) == 0
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/retrain.py")
    page.query_params["model"] = "cut"
    page.run()
    assert not page.exception, page.exception
    assert not any(w.label == "Prompts" for w in page.text_input)  # closed: nothing is computed
    widget(page.toggle, "Let the dense model write").set_value(True).run()
    widget(page.text_input, "Prompts").set_value(prompts).run()
    widget(page.number_input, "Max tokens").set_value(9).run()
    widget(page.selectbox, "Check").set_value("none").run()
    wait(page, lambda p: any(m.label == "New tokens, at most" for m in p.metric))
    assert {m.label: m.value for m in page.metric}["New tokens, at most"] == "63"
    assert "Say &lt;b&gt;0&lt;/b&gt;" in html_of(page)
    (line,) = [c.value for c in page.code if "core generate" in c.value]
    assert line.split()[4:] == [
        *("generate", str(tiny_gqa), "--prompts", prompts, "--out", "DIR"),
        *("--check", "none", "--max-tokens", "9"),
    ][1:]  # fmt: skip
    widget(page.button, "Write the text").click().run()
    (record,) = here.runs("generate")
    wait(page, lambda p: Summary.read(record.path) and any(b.label == TRAIN for b in p.button))
    assert any("7 rows:" in m.value for m in page.markdown)
    assert "own answer (kept)" in html_of(page)
    widget(page.button, TRAIN).click().run()
    assert widget(page.text_input, "Data").value == str(record.path)
    offered = [p for p in page.get("button_group") if "in_retrain_data" in p.proto.id]
    assert offered
    assert any("Answers of" in option.content for option in offered[0].proto.options)
