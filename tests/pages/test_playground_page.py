"""The playground without a browser: its columns, its thread, and what it draws."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.checkpoint.drop import Removal
from core.checkpoint.locate import local_folder
from core.errors import OptionError, RunError
from core.live import columns
from core.live.playground import Session
from core.live.protocol import Tokens
from core.live.replies import Begun, Token, Waiting, Written
from core.prune import toggle
from core.runs import workspace
from core.runs.spec import build
from core.runs.workspace import Workspace
from core.ui.live import Desk, Question, key_of
from core.ui.prune_pad import Pad

ROOT = Path(__file__).parents[2]


@pytest.fixture
def open_page(tmp_path, monkeypatch, tiny_gqa):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))

    def opened(session=None, **query):
        at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
        for name, value in (session or {}).items():
            at.session_state[name] = value
        for name, value in {"model": str(tiny_gqa), **query}.items():
            at.query_params[name] = value
        at.switch_page("pages/playground.py").run()
        assert not at.exception, at.exception
        return at

    return opened


def begin(blocks):
    return Begun(
        parameters=1000 * blocks, blocks=blocks, weights_mib=1.5, cache_mib=0.5,
        prompt_tokens=3, device="cpu", dtype="float32",
    )  # fmt: skip


DONE = Written(tokens=2, tokens_per_s=40.0, first_token_s=0.025, ended=True)


def answers(question, stop):
    """Two tokens a column; one column fails, as a checkpoint that is gone does."""
    if question["checkpoint"] == "gone":
        raise RunError("gone is not there.", "Choose another.")
    yield Waiting(why="loading")
    yield begin(5 - len(question["skip"]))
    yield Token(ids=(7,), texts=("a red ",) * question["batch"])
    last = "ball" if question["skip"] else "boat"
    yield Token(ids=(8,), texts=(last,) * question["batch"])
    yield DONE


def question(checkpoint="x", skip=(), batch=1):
    return {"checkpoint": checkpoint, "skip": list(skip), "batch": batch}


def test_columns_come_one_after_another_and_an_error_stays_in_its_column(tmp_path):
    busy, most = 0, 0

    def ask(asked, stop):
        nonlocal busy, most
        busy, most = busy + 1, max(most, busy + 1)
        try:
            time.sleep(0.02)
            yield from answers(asked, stop)
        finally:
            busy -= 1

    wanted = [("dense", question()), ("gone", question("gone")), ("less", question(skip=(2,)))]
    session = Session(wanted, Workspace(tmp_path), ask).start()
    session.join(60)
    assert most == 1
    assert [o.state for o in session.outputs] == ["done", "failed", "done"]
    assert [o.texts for o in session.outputs] == [["a red boat"], [""], ["a red ball"]]
    assert session.outputs[1].note == "gone is not there. Choose another."
    assert session.outputs[2].begun.blocks == 4


def test_stopping_ends_the_column_and_those_behind_it(tmp_path):
    started, closed = threading.Event(), threading.Event()

    def ask(asked, stop):
        try:
            yield begin(5)
            while True:
                yield Token(ids=(1,), texts=("x",))
                started.set()
                time.sleep(0.01)
        finally:
            closed.set()

    session = Session([("a", question()), ("b", question())], Workspace(tmp_path), ask).start()
    assert started.wait(60)
    session.stop()
    session.join(60)
    assert closed.wait(60)
    assert [o.state for o in session.outputs] == ["stopped", "stopped"]
    assert session.outputs[0].texts[0].startswith("x")


def test_codes_of_the_address():
    known = columns.variants(Workspace("nowhere"), "demo")
    assert columns.from_address("dense|skip:3,5|run:a|skip:1|skip:2") == [
        "dense", "skip:3,5", "run:a", "skip:1",
    ]  # fmt: skip
    found = columns.column("skip:3,5", "demo", known)
    assert (found.skip, found.title, found.checkpoint) == (Removal((3, 5)), "without 3, 5", "demo")
    found = columns.column("skip:3;attention=7;mlp=2;width=4:96;neurons=run-1", "demo", known)
    assert found.skip == Removal((3,), (7,), (2,), ((4, 96),), "run-1")
    assert found.title == f"without {found.skip.text}"
    assert f"skip:{toggle.removal_to_text(found.skip)}" == found.code
    asked = build(Tokens, {**found.question, "text": "x"})
    assert (asked.removal, asked.checkpoint) == (found.skip, "demo")
    assert toggle.removal_from_text("3, 5; attention 7 ; mlp 2,4") == Removal((3, 5), (7,), (2, 4))
    assert columns.column("run:none", "demo", known) is None
    with pytest.raises(OptionError):
        columns.column("skip:x", "demo", known)
    with pytest.raises(OptionError, match="'head 3' is not"):
        columns.column("skip:1;head 3", "demo", known)


def test_words_that_differ_are_marked_and_nothing_is_run():
    assert columns.marked("a red ball.", "a red boat.") == "a red <mark>ball</mark>."
    assert columns.marked("<b>x</b>", "<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"
    assert columns.marked("same", "same") == "same"
    assert "<script>" not in columns.marked("<script>", "")


def test_the_page_shows_columns_texts_and_figures(open_page, tmp_path, tiny_gqa):
    at = open_page(columns="dense|skip:1,3", seed="7")
    assert at.multiselect(key="playground_columns").value == ["dense", "skip:1,3"]
    assert at.number_input(key="in_generate_seed_1").value == 7
    wanted = [("dense", question()), ("without 1, 3", question(skip=(1, 3)))]
    session = Session(wanted, Workspace(tmp_path), answers).start()
    session.join(60)
    at.session_state["playground_session"] = session
    at.run()
    assert not at.exception
    shown = at.table[0].value
    assert shown.loc["parameters"].tolist() == ["5,000", "3,000"]
    assert shown.loc["speed"].tolist() == ["40.0 tokens/s"] * 2
    assert shown.loc["first token"].tolist() == ["25 ms"] * 2
    texts = " ".join(h.proto.body for h in at.get("html"))
    assert "a red boat" in texts
    assert "a red <mark>ball</mark>" in texts


def test_the_plan_under_way_keeps_its_parts(open_page):
    pad = Pad()
    pad.change(Removal((1,), (2,), (3,)))
    at = open_page({"prune_pad": pad})
    assert at.multiselect(key="playground_columns").value == ["dense", "skip:1;attention=2;mlp=3"]
    at.text_input(key="playground_skip").set_value("mlp 0").run()
    assert at.multiselect(key="playground_columns").value[2] == "skip:mlp=0"
    assert "without MLP of 0" in at.multiselect(key="playground_columns").options


def test_bad_addresses_are_told(open_page):
    at = open_page(columns="skip:x", top_p="7.0")
    said = " ".join(e.value for e in at.error)
    assert "'x' is not a whole number" in said
    assert "'Top p': 7.0 is too large" in said
    at = open_page(max_tokens="many")
    assert [e.value for e in at.error] == [
        "'Max tokens': invalid value 'many'. Expected a whole number."
    ]


def test_a_variant_of_the_workspace_can_be_a_column(open_page, tmp_path, tiny_gqa):
    from core.prune import depth

    folder = tmp_path / "small"
    depth.prune(tiny_gqa, (2,), folder)
    spec = {"checkpoint": str(tiny_gqa), "drop": [2], "out": str(folder)}
    workspace.write_json(folder / ".run" / "spec.json", {"command": "prune", "spec": spec})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    for query in ({"columns": "dense|run:small"}, {}):  # it also stands beside dense at first
        at = open_page(**query)
        assert at.multiselect(key="playground_columns").value == ["dense", "run:small"]
    found = columns.variants(Workspace(), str(tiny_gqa))
    small = columns.column("run:small", str(tiny_gqa), found).checkpoint
    assert local_folder(small).resolve() == folder.resolve()
    assert columns.column("dense", "small", columns.variants(Workspace(), "small")).checkpoint == (
        str(tiny_gqa)
    )


def test_the_desk_asks_once_gives_up_what_is_not_wanted_and_keeps_errors(tiny_gqa):
    from core.checkpoint import headers

    info = headers.inspect(tiny_gqa)
    text, go, asked = {"source": "demo"}, threading.Event(), []

    def ask(one):
        asked.append(one)
        while not go.is_set() and not one.stop.is_set():
            time.sleep(0.01)
        if 4 in one.skip.drop:
            raise RunError("It was killed.", "Ask again.")
        one.ppl = 10.0 + len(one.skip.drop)

    desk = Desk(ask)

    def want(*skip):
        key = key_of(info, text, Removal(skip))
        return key, desk.want("me", key, Question("x", Removal(skip), text))

    first_key, first = want(1)
    assert want(1)[1] is first
    key, second = want(1, 2)
    assert first.stop.is_set()
    go.set()
    deadline = time.monotonic() + 60
    while not second.done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert desk.known(key).ppl == 12.0
    assert desk.known(first_key) is None
    assert desk.answers(info, text) == [(Removal((1, 2)), 12.0)]
    bad_key, bad = want(4)
    while not bad.done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert bad.error == "It was killed. Ask again."
    assert want(4)[1] is bad
    assert desk.known(bad_key) is None
    want(1, 2)
    anew = want(4)[1]
    assert anew is not bad
    while not anew.done and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(asked) == 4
