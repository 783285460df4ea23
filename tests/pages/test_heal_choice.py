"""The Heal choice of the Prune page without a browser, and what it shows after a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.heal import command as command_of
from core.prune import depth
from core.prune.plan import parameters_after
from core.runs import pace, workspace
from core.ui import heal_form
from core.words import duration

ROOT = Path(__file__).parents[2]
HEALING = {
    "asked": "auto",
    "method": "refit",
    "kl_before": 0.5,
    "kl_after": 0.25,
    "nll_dense": 0.0,
    "nll_before": 2.0,
    "nll_after": 1.0,
    "tried": {"refit": 0.25, "linear": 0.4},
    "heldout_tokens": 64,
    "calibration": {"source": "demo", "samples": 8, "length": 32, "seed": 7},
    "device": "cpu",
    "dtype": "float32",
}


def open_page(tiny_gqa, drop, **query):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    for name, value in {"model": str(tiny_gqa), "drop": drop, **query}.items():
        at.query_params[name] = value
    at.switch_page("pages/prune.py").run()
    assert not at.exception, at.exception
    return at


def command(at):
    return next(c.value for c in at.code if " prune " in c.value)


def captions(at):
    return " ".join(c.value for c in at.caption)


def test_the_choice_makes_the_command(here, tiny_gqa):
    at = open_page(tiny_gqa, "3,1")
    assert "--heal" not in command(at)
    heal = at.radio(key="in_prune_heal")
    heal.set_value("refit").run()
    assert "--heal refit" in command(at)
    assert "Seams at blocks 1; 3, healed on 128 rows of" in captions(at)
    at.number_input(key="in_prune_samples").set_value(4).run()
    at.number_input(key="in_prune_length").set_value(16).run()
    assert "needs at least 640 tokens" in " ".join(e.value for e in at.error)
    assert next(b for b in at.button if b.label == "Create the variant").disabled
    at = open_page(tiny_gqa, "0")
    at.radio(key="in_prune_heal").set_value("linear").run()
    assert "the cut begins at block 0" in " ".join(e.value for e in at.error)


def test_states_that_go_to_the_disk_are_told(here, tiny_gqa):
    at = open_page(tiny_gqa, "3,1")
    at.radio(key="in_prune_heal").set_value("scale").run()
    at.number_input(key="in_prune_samples").set_value(100000).run()
    at.number_input(key="in_prune_length").set_value(16).run()
    assert "on the disk" not in captions(at)
    at.number_input(key="in_prune_memory_limit").set_value(1.2).run()
    assert "do not fit in memory: 0.5 GiB of them are on the disk while it heals" in captions(at)
    assert not next(b for b in at.button if b.label == "Create the variant").disabled
    at.number_input(key="in_prune_memory_limit").set_value(0.5).run()
    assert "Memory: 0.50 GiB are too little" in " ".join(e.value for e in at.error)


def test_the_time_is_told_plain_and_healed(here, tiny_gqa):
    at = open_page(tiny_gqa, "3,1")
    assert "Estimated time: about 1 s, at an assumed rate of writing" in captions(at)
    cut = here.root / "large"
    (cut / ".run").mkdir(parents=True)
    workspace.write_json(cut / ".run" / "spec.json", {"command": "prune", "spec": {}})
    ended = {"state": "done", "created": 1.0, "started": 1.0, "finished": 101.5}
    workspace.write_json(cut / ".run" / "status.json", ended)
    with (cut / "model.safetensors").open("wb") as file:
        file.truncate(100_000_000)
    info = headers.inspect(tiny_gqa)
    size = info.memory_bytes[info.dtype] * parameters_after(info, Removal((3, 1))) / info.parameters
    # 1 MB/s, once 0.5 s of starting are taken off
    copying = pace.writing(size)
    assert copying == (
        pytest.approx(size / 1e6, rel=0.02),
        "the rate of the last cut in this workspace",
    )
    scores, rate = here.root / "scores", {"device": "cpu", "parameters": info.parameters}
    (scores / ".run").mkdir(parents=True)
    workspace.write_json(scores / ".run" / "spec.json", {"command": "importance", "spec": {}})
    workspace.write_json(scores / ".run" / "status.json", {"state": "done", "created": 1.0})
    spec = command_of.PruneSpec(drop=(3, 1), heal="auto", checkpoint=str(tiny_gqa), out="DIR")
    flops = command_of.healing_flops(spec, info, Removal((3, 1)))
    workspace.write_json(scores / "summary.json", {**rate, "flops_per_s": flops / 600})
    at.radio(key="in_prune_heal").set_value("auto").run()
    assert f"about {duration(603 + copying[0])}, at the rate of the last run" in captions(at)


def test_plain_and_healed_stand_side_by_side(here, tiny_gqa):
    folder = here.root / "healed"
    (folder / ".run").mkdir(parents=True)
    spec = {"checkpoint": str(tiny_gqa), "out": str(folder)}
    workspace.write_json(folder / ".run" / "spec.json", {"command": "prune", "spec": spec})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    cut = {"method": "depth", "source_key": headers.inspect(tiny_gqa).key, "dropped": [3, 1]}
    workspace.write_json(folder / "pruning.json", {**cut, "healing": HEALING})
    at = open_page(tiny_gqa, "1,3")
    table = at.table[0].value
    assert table.loc["healed", "plan A"] == "refit"
    assert table.loc["KL: plain, healed", "plan A"] == "0.5, 0.25 (measured)"
    assert table.loc["perplexity: plain, healed", "plan A"] == "7.389, 2.718 (measured)"
    assert table.loc["perplexity: plain, healed", "dense"] == "1"
    assert table.loc["healed", "plan B"] == "not healed yet"
    written = workspace.read_json(folder / "pruning.json")
    workspace.write_json(folder / "pruning.json", {**written, "attention": [2]})
    assert "healed" not in open_page(tiny_gqa, "1,3").table[0].value.index  # another cut
    parts = open_page(tiny_gqa, "1,3", attention="2").table[0].value
    assert parts.loc["perplexity: plain, healed", "plan A"] == "7.389, 2.718 (measured)"
    workspace.write_json(folder / "pruning.json", written)
    assert "(64 tokens) of the healing text demo, 8 x 32 tokens, seed 7; cpu, float32" in (
        captions(at)
    )

    def script():
        import streamlit as st

        from core.ui import heal_form

        heal_form.result(st.session_state["run"])

    shown = AppTest.from_function(script)
    shown.session_state["run"] = "healed"
    shown.run()
    assert [(m.label, m.value, m.delta) for m in shown.metric] == [
        ("KL to the dense model, healed", "0.25", "plain 0.5 (-50.0%)"),
        ("Perplexity, healed", "2.718", "plain 7.389 (-63.2%); dense 1"),
    ]
    depth.prune(tiny_gqa, (1, 3), folder, healing=None, overwrite=True)
    written = workspace.read_json(folder / "pruning.json")
    workspace.write_json(folder / "pruning.json", {**written, "healing": HEALING})
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    page.query_params["model"] = str(folder)
    page.switch_page("pages/checkpoint.py").run()
    assert not page.exception
    assert "Healed by refit." in " ".join(m.value for m in page.markdown)
    assert set(heal_form.ABOUT) == {"none", "refit", "linear", "scale", "auto"}
