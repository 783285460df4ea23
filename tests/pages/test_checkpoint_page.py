"""The Checkpoint page says what `inspect` says, and what is wrong in the same words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from core.__main__ import main

APP = str(Path(__file__).parents[2] / "app.py")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A workspace of the test's own."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))


def open_page(folder) -> AppTest:
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/checkpoint.py")
    page.query_params["model"] = str(folder)
    page.run()
    assert not page.exception, page.exception
    return page


def inspected(folder, capsys) -> dict:
    assert main(["inspect", str(folder)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("variant", ["gqa", "tied", "qwen3"])
def test_tables_and_tiles_are_what_inspect_prints(variant, tiny_dir, capsys):
    folder = tiny_dir(variant)
    facts = inspected(folder, capsys)
    page = open_page(folder)
    tiles = {tile.label: tile.value for tile in page.metric}
    assert tiles["Parameters"] == f"{facts['parameters']['total']:,}"
    assert tiles["Family"] == facts["family"]
    shown = page.table[0].value["value"]
    assert shown["hidden size"] == f"{facts['hidden']:,}"
    assert shown["key/value heads"] == str(facts["kv_heads"])
    assert shown["tied embeddings"] == ("yes" if facts["tied"] else "no")
    parts = page.table[1].value["parameters"]
    counts = {part: int(shown.replace(",", "")) for part, shown in parts.items()}
    assert {"total": sum(counts.values()), **counts} == facts["parameters"]
    per_block = page.dataframe[0].value
    assert per_block["parameters"].tolist() == facts["block_parameters"]
    assert list(page.table[2].value.index) == list(facts["memory_bytes"])
    assert any(f"core inspect {folder}" in c.value for c in page.code)


def test_what_commands_take_on_a_gpu_is_what_estimate_prints(tiny_gqa, capsys):
    page = open_page(tiny_gqa)
    page.selectbox(key="estimate_model").set_value("70b").run()
    page.selectbox(key="estimate_on").set_value("a100").run()
    assert not page.exception, page.exception
    assert main(["estimate", "70b", "--on", "a100"]) == 0
    said = json.loads(capsys.readouterr().out)["rows"]
    table = pd.concat([t.value for t in page.table if "bound by" in t.value.columns])
    assert list(table["what"]) == [row["what"] for row in said]
    assert list(table.index) == [row["command"] for row in said]
    counts = {tile.label: tile.value for tile in page.metric}
    lacking = sum(row["seconds"] is None for row in said)
    assert counts["Need more memory"].startswith(f"{lacking} of ")
    assert [how == "does not fit" for how in table["how"]] == [
        row["seconds"] is None for row in said
    ]
    assert any("core estimate 70b --on a100" in code.value for code in page.code)


def test_a_config_alone_is_enough_and_said(tiny_gqa, tmp_path):
    shutil.copy(tiny_gqa / "config.json", tmp_path)
    tiles = {tile.label: tile.value for tile in open_page(tmp_path).metric}
    assert tiles["On disk"] == "config only"


@pytest.mark.parametrize("damage", ["truncated", "no config", "not a model", "unknown family"])
def test_wrong_checkpoints_get_the_command_lines_sentence(damage, tiny_gqa, tmp_path, capsys):
    folder = tmp_path / "bad"
    shutil.copytree(tiny_gqa, folder)
    config = folder / "config.json"
    if damage == "truncated":
        weights = next(folder.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no config":
        config.unlink()
    else:
        change = (
            {"architectures": ["BertModel"]}
            if damage == "not a model"
            else {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        )
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert main(["inspect", str(folder)]) == 2
    sentence = capsys.readouterr().err.strip().removeprefix("Error: ")
    page = open_page(folder)
    assert sentence in [e.value for e in page.error]
    assert not page.metric
