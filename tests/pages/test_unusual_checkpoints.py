"""Pages of checkpoints that are stored in unusual formats or hold more than the model uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamlit.testing.v1 import AppTest

from core.checkpoint import headers
from core.words import size

APP = str(Path(__file__).parents[2] / "app.py")


def opened(folder, page=None):
    app = AppTest.from_file(APP, default_timeout=60)
    if page:
        app.switch_page(page)
    app.query_params["model"] = str(folder)
    app.run()
    assert not app.exception, app.exception
    return app


def store_as(folder, code):
    """Rewrite the weights with one byte each, in the format ``code``."""
    table, at = {}, 0
    for tensor in headers.TensorIndex.read(folder).shards[0].tensors:
        offsets = [at, at + tensor.parameters]
        table[tensor.name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        at += tensor.parameters
    head = json.dumps(table).encode()
    data = len(head).to_bytes(8, "little") + head + bytes([56]) * at
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E8M0"])
def test_unusual_formats_break_no_page(here, tiny_gqa, tmp_path, code):
    folder = shutil.copytree(tiny_gqa, tmp_path / "copy")
    store_as(folder, code)
    info = headers.inspect(folder)
    tiles = {tile.label: tile.value for tile in opened(folder).metric}
    shown = next(value for label, value in tiles.items() if label.startswith("Weights"))
    assert shown == size(info.stored_bytes)
    for page in ("checkpoint", "prune"):
        opened(folder, f"pages/{page}.py")


def test_leftover_tensors_are_shown(here, tiny_gqa, tmp_path):
    folder = shutil.copytree(tiny_gqa, tmp_path / "copy")
    stored = load_file(folder / "model.safetensors") | {"vision.weight": torch.ones(3, 4)}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    for page in ("pages/checkpoint.py", None):
        (warning,) = [w.value for w in opened(folder, page).warning]
        assert "1 stored tensor is not part of the model (12 parameters" in warning
