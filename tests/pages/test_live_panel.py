"""Live perplexities of the Prune page: which text is asked for, how it is named and kept."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import tiny
from streamlit.testing.v1 import AppTest

from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.errors import DataError
from core.runs import workspace
from core.ui import live, live_panel

ROOT = Path(__file__).parents[2]
WHOLE = 20
PART = 4


class Fake:
    """Answers at once: 10 for the dense model, one more a block; remembers what was asked.

    On all of the held-out text it is half a nat more; a prompt is continued with one sentence.
    """

    def __init__(self):
        self.asked = []
        self.tokens_per_s = 1e6

    def __call__(self, question):
        self.asked.append((question.text, question.skip))
        if "prompt" in question.text:
            question.written = " and *sees* the ball."
            return
        if question.text["source"] == "nowhere.txt":
            raise DataError("No text source 'nowhere.txt': there is no such file.", "Give demo.")
        whole = "quick" not in question.text
        question.dense_ppl = 10.0 + (0.5 if whole else 0.0)
        question.ppl = question.dense_ppl + question.skip.units / 2
        question.windows, question.of = (WHOLE if whole else PART), WHOLE
        question.device, question.dtype = "cpu", "float32"
        question.stderr, question.tokens_per_s = 0.0125, self.tokens_per_s

    @property
    def sources(self):
        return {text["source"] for text, _ in self.asked if "source" in text}

    @property
    def kinds(self):
        """What was asked, in order."""
        return [
            "words" if "prompt" in text else "rows" if "samples" in text
            else "quick" if "quick" in text else "whole"
            for text, _ in self.asked
        ]  # fmt: skip


@pytest.fixture
def fake(here, monkeypatch):
    """The live process replaced by one that answers at once."""
    found = Fake()
    monkeypatch.setattr(live, "ask_live", found)
    live.desk.clear()
    yield found
    live.desk.clear()


def open_page(model, **query):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.session_state["live_on"] = True
    for name, value in {"model": str(model), **query}.items():
        at.query_params[name] = value
    at.switch_page("pages/prune.py").run()
    return settled(at)


def settled(at):
    """Draw the page until all it asked for in the background has come and it asks for no more."""
    deadline, calm, known = time.monotonic() + 60, 0, -1
    while calm < 2:
        assert time.monotonic() < deadline, "an answer did not come"
        at.run()
        assert not at.exception, at.exception
        asked = list(live.desk()._known.values())
        still = known == len(asked) and all(question.done for question in asked)
        calm, known = calm + 1 if still else 0, len(asked)
    return at


def metrics(at):
    return {m.label: (m.value, m.delta) for m in at.metric}


def captions(at):
    return " ".join(c.value for c in at.caption)


def answers(at):
    """The table of live answers: a row per text."""
    return next(t.value for t in at.table if "plan / dense" in t.value.columns)


def field(at):
    return next(i for i in at.text_input if i.label == "Held-out text")


def scored(here, model, text):
    """An importance run of ``model`` made on ``text``."""
    folder = here.root / "importance-1"
    (folder / ".run").mkdir(parents=True)
    spec = {"checkpoint": str(model), "out": str(folder)}
    workspace.write_json(folder / ".run" / "spec.json", {"command": "importance", "spec": spec})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    about = {"calibration": str(text), "samples": 4, "length": 32, "seed": 7, "dtype": "float32"}
    key = headers.inspect(model).key
    about |= {"checkpoint_key": key, "dense_ppl": 7.5, "device": "cpu"}
    workspace.write_json(folder / "summary.json", about)
    rows = [(b, 8.0 + b) for b in range(tiny.BLOCKS)]
    workspace.write_csv(folder / "blocks.csv", ("block", "ppl"), rows)


def test_a_few_windows_answer_first_and_each_figure_says_how_much_it_is(fake, tiny_gqa):
    at = open_page(tiny_gqa, drop="1,3", text="demo")
    assert metrics(at)["Perplexity, measured"] == ("1.19 x dense", "12.5, dense 10.5")
    assert f"Measured live on demo (held out), all {WHOLE * 128:,} tokens, cpu float32" in captions(
        at
    )
    assert fake.kinds == ["quick", "whole", "words"]  # the text comes after the figures
    assert all(text.get("paired") for text, _ in fake.asked[:2])
    table = answers(at)
    assert list(table.index) == ["held-out text, first figure", "held-out text"]
    assert list(table["tokens"]) == [
        f"{PART * 128} of {WHOLE * 128:,} tokens", f"all {WHOLE * 128:,} tokens",
    ]  # fmt: skip
    assert list(table["plan / dense"]) == ["1.2 ± 0.015", "1.19 ± 0.015"]
    assert "and \\*sees\\* the ball." in " ".join(m.value for m in at.markdown)


def test_the_first_figure_is_shown_until_a_better_one_is_there(fake, tiny_gqa, monkeypatch):
    go = threading.Event()
    real = fake.__call__

    def slow(question):
        if "quick" not in question.text:
            go.wait(30)
        real(question)

    monkeypatch.setattr(live, "ask_live", slow)
    live.desk.clear()
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.session_state["live_on"] = True
    at.query_params["model"], at.query_params["drop"] = str(tiny_gqa), "1"
    at.switch_page("pages/prune.py").run()
    deadline = time.monotonic() + 30
    while "Perplexity, measured" not in metrics(at) and time.monotonic() < deadline:
        at.run()
    assert metrics(at)["Perplexity, measured"] == ("1.10 x dense", "11, dense 10")
    line = f"Measured live on english (held out), {PART * 128} of {WHOLE * 128:,} tokens"
    assert line in captions(at)
    go.set()
    assert metrics(settled(at))["Perplexity, measured"][0] == "1.10 x dense"
    assert f"all {WHOLE * 128:,} tokens" in captions(at)


def test_rows_that_take_long_are_measured_only_when_asked_for(fake, here, tiny_gqa):
    fake.tokens_per_s = 4 * 32 / live_panel.ROWS_S - 1
    scored(here, tiny_gqa, "demo")
    at = open_page(tiny_gqa, drop="1,2")
    assert fake.kinds == ["quick", "whole", "words"]
    box = next(c for c in at.checkbox if c.label.startswith("Also measure"))
    box.check().run()
    settled(at)
    assert fake.kinds[-1] == "rows"
    assert at.table[0].value.loc["perplexity", "plan A"] == "12.5 (measured)"


def test_a_text_of_ones_own_is_kept_in_the_address_and_over_page_changes(fake, tiny_gqa):
    at = open_page(tiny_gqa, drop="1")
    assert field(at).placeholder == "english"
    field(at).set_value("mine.txt").run()
    settled(at)
    assert fake.sources == {"english", "mine.txt"}
    assert at.query_params["text"] in ("mine.txt", ["mine.txt"])
    at.switch_page("pages/importance.py").run()
    at.switch_page("pages/prune.py").run()
    assert field(at).value == "mine.txt"
    shared = open_page(tiny_gqa, text="other.txt")
    assert field(shared).value == "other.txt"
    assert "other.txt" in fake.sources
    field(shared).set_value("").run()
    settled(shared)
    assert "text" not in shared.query_params


def test_a_bad_text_is_one_sentence_and_the_page_goes_on(fake, tiny_gqa):
    at = open_page(tiny_gqa, drop="1,3", text="nowhere.txt")
    sentence = "No text source 'nowhere.txt': there is no such file. Give demo."
    assert [w.value for w in at.warning] == [sentence]
    assert len(fake.asked) == 1  # not again at every poll
    assert any(" prune " in c.value for c in at.code)
    next(b for b in at.button if b.label == "Ask again").click().run()
    settled(at)
    assert len(fake.asked) == 2
    field(at).set_value("demo").run()
    settled(at)
    assert not at.warning
    assert metrics(at)["Perplexity, measured"] == ("1.19 x dense", "12.5, dense 10.5")


def test_the_usual_text_is_the_demos_or_english(fake, here, tiny_gqa, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("Ann sees the red ball.\n" * 50)
    assert live_panel.usual_source("demo") == "demo"
    scored(here, tiny_gqa, mine)
    at = open_page(tiny_gqa, drop="1")
    assert field(at).placeholder == "english"
    assert fake.sources == {str(mine), "english"}
    assert fake.kinds == ["quick", "whole", "words", "rows"]
    table = answers(at)
    assert list(table["text"]) == ["english", "english", "mine.txt"]
    assert table.index[-1] == "calibration rows of the scores"
    assert "Measured live on english (held out)" in captions(at)
    assert "mine.txt" not in next(c.value for c in at.caption if "Measured live" in c.value)


def test_all_of_a_text_is_given_up_when_the_plan_changes(tiny_gqa):
    """A session's own questions alone are given up; what it still wants goes on."""
    desk = live.Desk(lambda question: question.stop.wait(20))
    info = headers.inspect(tiny_gqa)

    def want(who, **text):
        key = live.key_of(info, text, Removal((1,)))
        return key, desk.want(who, key, live.Question("x", Removal((1,)), text))

    kept, first = want("me plan", source="a", quick=True)
    _, second = want("me plan", source="a")
    _, other = want("you plan", source="b")
    desk.give_up("me plan", [kept])
    assert [q.stop.is_set() for q in (first, second, other)] == [False, True, False]
    assert want("me plan", source="a")[1] is not second
    for question in (first, other, want("me plan", source="a")[1]):
        question.stop.set()


def test_what_two_sessions_wait_for_goes_on_until_neither_wants_it(tiny_gqa):
    desk = live.Desk(lambda question: question.stop.wait(20))
    info = headers.inspect(tiny_gqa)
    text = {"source": "a"}

    def want(who, *skip):
        asked = live.Question("x", Removal(skip), text)
        return desk.want(who, live.key_of(info, text, asked.skip), asked)

    shared = want("me plan", 1)
    assert want("you plan", 1) is shared
    mine = want("me plan", 2)
    assert not shared.stop.is_set()
    yours = want("you plan", 3)
    assert shared.stop.is_set()
    for question in (mine, yours):
        question.stop.set()


def test_the_first_figure_comes_with_the_drawing_that_asked_for_it(fake, tiny_gqa, monkeypatch):
    """If it comes soon; otherwise the page does not wait for it."""
    at = open_page(tiny_gqa, drop="1", text="demo")

    def late(seconds):
        def answer(question):
            time.sleep(seconds)
            fake(question)

        monkeypatch.setattr(live.desk(), "_ask", answer)

    late(0.1)
    pills = next(g for g in at.button_group if g.key.startswith("pad_pills"))
    pills.set_value([1, 2]).run()
    assert metrics(at)["Perplexity, measured"] == ("1.20 x dense", "12, dense 10")
    late(3.0)
    began = time.monotonic()
    pills = next(g for g in at.button_group if g.key.startswith("pad_pills"))
    pills.set_value([2]).run()
    assert time.monotonic() - began < 2.9
    assert "Perplexity, measured" not in metrics(at)
