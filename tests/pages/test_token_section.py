"""The Playground's section on one text as two models read it."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

from core.live.replies import Scored
from core.live.token_pair import TokenPair

APP = str(Path(__file__).parents[2] / "app.py")


def reading(*nll):
    top = ((), *[((" b", 0.5),)] * (len(nll) - 1))
    ids = tuple(range(len(nll)))
    names = ("a", " <i>b", " c")[: len(nll)]
    return Scored(ids=ids, pieces=names, nll=nll, top=top, device="cpu", dtype="float32")


def test_both_readings_stand_side_by_side(here):
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/playground.py")
    page.query_params["model"] = "demo"
    page.query_params["columns"] = "dense+skip:4,5"
    page.run()
    assert not page.exception, page.exception
    button = next(b for b in page.button if b.label == "Read it with both")
    assert not button.disabled

    def ask(question, stop):
        yield reading(None, 1.0, 2.0) if not question["skip"] else reading(None, 3.0, 2.0)

    questions = ({"checkpoint": "demo", "skip": []}, {"checkpoint": "demo", "skip": [4]})
    pair = TokenPair("a b c", ("dense", "cut"), questions, here, ask=ask).start()
    pair.join(10)
    page.session_state["token_pair"] = pair
    page.run()
    assert not page.exception, page.exception
    shown = [element.proto.body for element in page.get("html")]
    both = [body for body in shown if "&lt;i&gt;b" in body]
    assert len(both) == 2
    assert "cut: loss 3.00 nats" in both[0]
    assert any("the dense model loses 1.500 nats per token, cut 2.500" in m.value
               for m in page.markdown)  # fmt: skip
    by = next(g for g in page.button_group if g.label == "Colour")
    by.set_value("the difference").run()
    shown = [element.proto.body for element in page.get("html")]
    assert any("solid rgb(213,94,0)" in body for body in shown)
    pair.readings[1] = reading(None, 3.0)
    page.run()
    assert any("their tokenizers differ" in w.value for w in page.warning)
