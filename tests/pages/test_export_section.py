"""Where a variant runs, and its export, on the Prune, Compare and Retrain pages."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import study_helpers
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.checkpoint import engines, locate
from core.export import formats
from core.runs import jobs
from core.runs.workspace import read_run
from core.words import size

APP = str(Path(__file__).parents[2] / "app.py")


@pytest.fixture
def pruned(here, tiny_gqa):
    out = here.root / "cut"
    assert main(["prune", str(tiny_gqa), "--drop", "1,3", "--out", str(out)]) == 0
    return out


def open_page(name, tiny_gqa, **query):
    page = AppTest.from_file(APP, default_timeout=90).switch_page(f"pages/{name}.py")
    for key, value in {"model": str(tiny_gqa), **query}.items():
        page.query_params[key] = value
    page.run()
    assert not page.exception, page.exception
    return page


def widget(found, key):
    return next(w for w in found if w.key == key)


def programs(page):
    return next(t.value for t in page.table if t.value.index.name == "program")


def command(page, start):
    return next(c.value for c in page.code if c.value.startswith(start))


def test_a_variant_is_exported_and_offered_for_download(here, pruned, tiny_gqa):
    page = open_page("prune", tiny_gqa)
    rows = engines.rows(locate.at(pruned).config)
    assert list(programs(page).index) == [row.engine for row in rows]
    assert list(programs(page)["runs"]) == ["yes"] * len(rows)
    widget(page.selectbox, "engine_cut").set_value("vLLM").run()
    assert command(page, "vllm") == f"vllm serve {pruned}"

    kinds = widget(page.get("button_group"), "type_cut")
    wanted = formats.formats(locate.at(pruned))[0].bytes
    assert [o.content for o in kinds.proto.options] == [
        f"{k}: {size(b)}" for k, b in wanted.items()
    ]
    widget(page.get("button_group"), "type_cut").set_value("q8_0")
    page.run()
    assert f"export {pruned} --format gguf --type q8_0" in command(page, "python -m core export")
    widget(page.button, "start_cut").click().run()
    assert not page.exception, page.exception
    (record,) = here.runs("export")
    deadline = time.monotonic() + 60
    while read_run(record.path).is_live:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    page.run()
    (file,) = record.path.glob("*.gguf")
    assert file.name == "cut-q8_0.gguf"
    assert str(file) in [c.value for c in page.code]
    labels = [b.proto.label for b in page.get("download_button")]
    assert f"cut-q8_0.gguf ({size(file.stat().st_size)})" in labels


def test_what_is_not_possible_says_why(pruned, tiny_gqa):
    page = open_page("prune", tiny_gqa)
    widget(page.get("button_group"), "format_cut").set_value("hub")
    page.run()
    assert any("'Repository', which is missing" in box.value for box in page.info)
    assert widget(page.button, "start_cut").disabled
    widget(page.text_input, "repo_cut").set_value("me/smaller").run()
    assert "--repo me/smaller" in command(page, "python -m core export")
    assert not widget(page.button, "start_cut").disabled


def test_a_retraining_is_exported_once_merged(here, pruned, tiny_gqa, monkeypatch):
    folder = study_helpers.run(
        here.root,
        "tuned",
        "retrain",
        1.0,
        checkpoint=str(pruned),
        data="demo",
        method="lora",
        rank=8,
    )
    (folder / "adapter").mkdir()
    page = open_page("retrain", tiny_gqa, run="tuned")
    found = programs(page)
    assert list(found.index[found["runs"] == "yes"]) == ["transformers with peft", "vLLM", "SGLang"]
    assert not [b for b in page.button if b.key == "start_tuned"]
    asked = []
    monkeypatch.setattr(jobs, "restart", lambda record, **changes: asked.append((record, changes)))
    widget(page.button, "merge_export_tuned").click().run()
    assert [(record.id, changes) for record, changes in asked] == [("tuned", {"merge": True})]
    shutil.copytree(pruned, folder / "merged", ignore=shutil.ignore_patterns(".run"))
    page = open_page("retrain", tiny_gqa, run="tuned")
    assert not widget(page.button, "start_tuned").disabled
    assert f"export {folder / 'merged'} --format gguf" in command(page, "python -m core export")


def test_the_compare_page_shows_where_a_point_runs(here, pruned, tiny_gqa):
    study_helpers.benchmark(
        here.root, "bench", 2.0, {"cut": str(pruned)},
        [{"id": "cut", "name": "cut", "batch_size": 1, "input_tokens": 12, "output_tokens": 8}],
    )  # fmt: skip
    page = open_page("compare", tiny_gqa, point="cut")
    assert "vLLM" in programs(page).index


def test_a_variant_is_quantized(here, pruned, tiny_gqa):
    page = open_page("prune", tiny_gqa)
    widget(page.get("button_group"), "format_cut").set_value("quantize")
    page.run()
    assert f"quantize {pruned} --bits 8" in command(page, "python -m core quantize")
    widget(page.get("button_group"), "bits_cut").set_value(4)
    page.run()
    offered = [o for o in widget(page.selectbox, "group_cut_4").options]
    assert offered == ["16", "8"]  # the default, then what else divides 32 and 48
    widget(page.selectbox, "group_cut_4").set_value(8).run()
    assert "--bits 4 --group 8" in command(page, "python -m core quantize")
    assert main(["quantize", str(pruned), "--bits", "8", "--out", str(here.root / "int8")]) == 0
    page = open_page("prune", tiny_gqa)
    widget(page.selectbox, "export_variant").set_value("int8").run()
    assert not page.exception, page.exception
    assert list(programs(page)["runs"]) == ["yes", *["no"] * 10]
    assert "## Runs in" in (here.root / "int8" / "README.md").read_text()
    assert not [b for b in page.button if b.key == "start_int8"]
    assert any("is quantized (int8)" in box.value for box in page.warning)
