"""Files of a split model: two gloo processes load, write and evaluate (split_worker.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from core.checkpoint.drop import Removal
from core.prune import depth
from core.retrain import split_files

WORKER = Path(__file__).with_name("split_worker.py")


def own_head(folder, tied):
    """Write a checkpoint whose config.json ties the matrices, and whose file has both."""
    written = tiny.write(folder, "gqa")
    config = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    if tied:
        tensors = load_file(written / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, written / "model.safetensors", {"format": "pt"})
    return written


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes found."""
    root = tmp_path_factory.mktemp("split")
    same = {name: tiny.write(root / name, name) for name in ("tied", "llama3", "qwen2", "qwen3")}
    same["mistral in bfloat16, several files"] = tiny.write(
        root / "mistral", "mistral", dtype="bfloat16", shard_bytes=40_000
    )
    same["own head"] = own_head(root / "own", False)
    same["copied head"] = own_head(root / "copied", True)
    same["parts"] = root / "parts"
    depth.prune(tiny.write(root / "whole", "gqa"), Removal((), (3,), (1,)), same["parts"])
    large = tiny.write(
        root / "large", "gqa", hidden_size=512, intermediate_size=1536, num_hidden_layers=8
    )
    asked = {
        "same": {name: str(path) for name, path in same.items()},
        "large": str(large),
        "model": str(same["llama3"]),
        "dense": str(same["own head"]),
        "wider": str(tiny.write(root / "wider", "llama3", intermediate_size=64)),
    }
    (root / "asked.json").write_text(json.dumps(asked))
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(root)], env=env)
        for rank in range(2)
    ]
    assert [one.wait(180) for one in both] == [0, 0]
    return [json.loads((root / f"result-{rank}.json").read_text()) for rank in range(2)]


def test_weights_buffers_and_settings_are_those_of_a_stock_load(results):
    for result in results:
        assert len(result["loaded"]) == 8
        for name, formats in result["loaded"].items():
            for dtype, found in formats.items():
                where = name, dtype
                assert found.pop("logits") <= (1e-5 if dtype == "torch.float32" else 0.1), where
                assert found.pop("share") == pytest.approx(0.5, abs=0.02), where
                assert all(found.values()), (where, found)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_neither_process_ever_has_the_whole_model(results):
    """Of the model's size: half of it is loaded; the states of Adam are written beside it."""
    for result in results:
        found = result["memory"]
        assert found["state"]
        assert 0.4 < found["load"] < 0.7
        assert found["write"] < 0.5  # the whole model would be 1, all states 2
        assert found["freed"] > 0.8


def test_processes_share_the_rows_of_evaluations(results):
    one, two = (result["evaluated"] for result in results)
    assert one["batches"] % 2 == 1 < one["batches"]  # one process computes a row for nothing
    assert len(one["taken"]) == len(two["taken"]) + 1
    assert sum(one["taken"]) + sum(two["taken"]) == one["rows"]
    assert one["two"] == two["two"]
    assert one["two"] == pytest.approx(one["one"], rel=1e-6)
    assert len(set(one["two"])) == 4


def test_what_is_wrong_in_one_process_is_said_by_all(results):
    for result in results:
        told = result["failed"]
        assert told["one alone"] == ("RunError: Cannot read the file: broken disk. Check the disk.")
        assert told["shape"].startswith("CheckpointError: The tensor model.layers.0.mlp.gate_proj")
        assert "has the shape [64, 32], but config.json implies [48, 32]" in told["shape"]


def test_files_are_divided_like_those_of_transformers(monkeypatch):
    monkeypatch.setattr(split_files, "FILE_BYTES", 100)
    made = [split_files.TensorEntry(n, "", "float32", (1,), 0, size) for n, size in
            (("a", 60), ("b", 40), ("c", 1), ("d", 200), ("e", 100))]  # fmt: skip
    files = split_files._divided(made)
    assert [[one.name for one in some] for some in files.values()] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert list(files)[0] == "model-00001-of-00004.safetensors"
    assert list(split_files._divided(made[:2])) == ["model.safetensors"]
