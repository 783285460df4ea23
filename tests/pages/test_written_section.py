"""Evaluate shows what models wrote, question by question, and queues what is missing of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import study_helpers as made
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.evaluate import known
from core.evaluate.results import Asked, Summary
from core.runs import workspace

APP = str(Path(__file__).parents[2] / "app.py")
TEXTS = {"dense": ("It is 7 pears.", "So we get <b>5</b>."), "cut": ("pear " * 12, "It is 4.")}
RIGHT = {"dense": ((1.0, 1.0), (0.0, 1.0)), "cut": ((0.0, 0.0), (0.0, 0.0))}


def write(here, name, folder, at):
    run = made.run(here.root, f"evaluate-{name}", "evaluate", at, checkpoint=folder)
    scores = [
        ("sums", f"exact_match,{which}", sum(r[place] for r in RIGHT[name]) / 2, 0.3, 2)
        for place, which in enumerate(("strict-match", "flexible-extract"))
    ]
    columns = ("task", "metric", "value", "stderr", "samples")
    workspace.write_csv(run / "tasks.csv", columns, scores)
    asked = Asked(task="sums", scores=tuple(scores), content="x",
                  output_types={"sums": "generate_until"})  # fmt: skip
    summary = Summary(
        checkpoint=str(folder), content=known.checkpoint_content(Path(folder)), tasks=(asked,),
        device="cpu", dtype="float32",
    )  # fmt: skip
    workspace.write_json(run / "summary.json", summary.to_dict())
    lines = [
        {"task": "sums", "index": index, "filter": which, "content": str(index), "target": "7",
         "question": f"Question *{index}*?", "metrics": {"exact_match": RIGHT[name][index][place]},
         "answer": "7", "generated": [TEXTS[name][index]]}
        for place, which in enumerate(("strict-match", "flexible-extract")) for index in (0, 1)
    ]  # fmt: skip
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def page(here, tiny_gqa):
    cut = here.root / "cut"
    assert main(["prune", str(tiny_gqa), "--drop", "2", "--out", str(cut)]) == 0
    write(here, "dense", tiny_gqa, 5)
    write(here, "cut", cut, 6)
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/evaluate.py")
    page.query_params["model"] = str(tiny_gqa)
    page.run()
    assert not page.exception, page.exception
    return page


def test_raw_text_is_shown_with_its_marks_and_figures(page):
    assert any(h.value == "Text that they wrote" for h in page.subheader)
    tables = [table.value for table in page.dataframe]
    table = next(t for t in tables if "repeated 4-grams" in t)
    assert list(table["texts"]) == [2, 2]
    assert list(table["words"]) == [4.0, 7.5]
    dense, cut = table["repeated 4-grams"]
    assert dense == 0.0
    assert cut == pytest.approx(8 / 9)  # "It is 4." has no 4-gram
    assert table["more than dense"][1] == cut
    labels = [e.label for e in page.expander if e.label.startswith("Question")]
    assert labels == ["Question 0: right / wrong", "Question 1: right in another layout / wrong"]
    codes = [c.value for c in page.code]
    assert all(text in codes for texts in TEXTS.values() for text in texts)


def test_one_click_queues_every_checkpoint_without_the_results(page, here, monkeypatch):
    started = []
    monkeypatch.setattr(
        "core.ui.runs.launch_once", lambda command, values, *_: started.append(values)
    )
    next(w for w in page.text_input if w.label == "Perplexity of").set_value("english").run()
    button = next(b for b in page.button if "without these results" in b.label)
    assert "2 checkpoints" in button.label
    button.click().run()
    assert not page.exception, page.exception
    assert [Path(values["checkpoint"]).name for values in started][-1] == "cut"
    assert len(started) == 2
    assert {values["perplexity"] for values in started} == {("english",)}
