"""Perplexity of a model that is read block by block: the numbers of the stock model in memory."""

import json

import pytest
import tiny
import torch

from core import commands
from core.__main__ import main
from core.checkpoint import headers
from core.evaluate import estimate
from core.evaluate.perplexity import streamed_losses, window_losses
from core.model.loading import load_model
from core.model.streaming import StreamedView
from core.runs import footprint, run
from core.runs.spec import build

CPU = torch.device("cpu")


def windows(count=9, length=24):
    made = torch.randint(3, 320, (count, length), generator=torch.Generator().manual_seed(0))
    return made.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gqa", "tied", "llama3", "qwen2", "qwen3", "mistral"])
def test_the_same_losses_bit_for_bit(tiny_dir, variant, dtype):
    folder = tiny_dir(variant)
    here = window_losses(load_model(folder, CPU, dtype), windows(), batch=2)
    view = StreamedView(folder, dtype, CPU)
    assert streamed_losses(view, windows(), batch=2) == here
    assert streamed_losses(view, windows(), group=5, batch=2) == here  # groups of whole batches
    view.close()


def test_every_group_reads_every_weight_once(tiny_gqa):
    view = StreamedView(tiny_gqa, torch.float32, CPU)
    norm = view.source.bytes_read
    stored = sum(e.end - e.start for e in view.source.entries.values()) - norm
    streamed_losses(view, windows(), batch=2)
    assert view.source.bytes_read - norm == stored
    streamed_losses(view, windows(), group=4, batch=2)
    assert view.source.bytes_read - norm == (1 + 3) * stored  # 4, 4 and 1 windows


@pytest.fixture
def bare(monkeypatch):
    monkeypatch.setattr(footprint, "PROCESS_BYTES", {"cpu": 0, "gpu": 0})


def evaluated(folder, out, text):
    command = commands.get("evaluate")
    values = {"checkpoint": str(folder), "out": str(out), "perplexity": (text,), "window": (16,),
              "device": "cpu", "fresh": True}  # fmt: skip
    assert run.execute(command, build(command.spec_class, values)) == 0
    return out


def test_a_streamed_run_leaves_the_same_files(tiny_gqa, tmp_path, monkeypatch, bare):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(60, seed=3), encoding="utf-8")
    here = evaluated(tiny_gqa, tmp_path / "here", str(text))
    weights = headers.inspect(tiny_gqa).parameters * 4
    monkeypatch.setattr(estimate, "limit_of", lambda *_: weights)
    there = evaluated(tiny_gqa, tmp_path / "there", str(text))
    assert "The weights are read block by block" in (there / ".run" / "log.txt").read_text()
    for name in ("perplexity.csv", "windows.csv"):
        assert (there / name).read_bytes() == (here / name).read_bytes()


def test_tasks_that_need_the_whole_model_are_refused_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    options = ["--tasks", "demo", "--memory-limit", "0.1", "--device", "cpu"]
    for more in ([], ["--dry-run"]):
        assert main(["evaluate", "demo", *options, "--out", str(tmp_path / "x"), *more]) == 2
        said = capsys.readouterr().err
        assert "--memory-limit: 0.1 GiB are too little. Tasks need the whole model" in said
    options = ["--perplexity", "demo", "--memory-limit", "4", "--device", "cpu", "--dry-run"]
    assert main(["evaluate", "demo", *options, "--out", "x"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["way"], shown["passes"], shown["memory_limit_mib"]) == ("fits", 1, 4096.0)
