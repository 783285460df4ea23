"""Sets of parts of blocks: costs by stock transformers, files, plans."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from core.__main__ import main
from core.doctor import plain
from core.importance.branches import make_batch
from core.model import loading
from core.model.blocks import BlockView
from core.prune import plan, scores
from core.prune.set_results import removal_of, units_in, written
from core.runs.progress import SILENT
from core.search import measure, methods
from core.search.ledger import NONE, Ledger
from core.search.methods import Task
from core.search.results import HeldoutRow, PairRow, Search, SetRow
from core.search.units import SUBLAYER, Units

CPU = torch.device("cpu")


def without_parts(model, removal):
    """Return mean loss and KL functions' model: the stock one, its parts silenced."""
    smaller = plain.without(model, ())
    with torch.no_grad():
        for block, layer in enumerate(smaller.model.layers):
            if removal.misses(block, "attention"):
                layer.self_attn.o_proj.weight.zero_()
            if removal.misses(block, "mlp"):
                layer.mlp.down_proj.weight.zero_()
    return smaller


def test_costs_equal_stock_transformers_without_the_parts(tiny_dir):
    model = loading.load_model(tiny_dir("gqa"), CPU, torch.float32)
    draw = torch.Generator().manual_seed(7)
    rows = [
        torch.randint(0, model.config.vocab_size, (n,), generator=draw).tolist() for n in (24, 9)
    ]
    view, units = BlockView(model), Units(SUBLAYER, len(model.model.layers))
    ledger = Ledger(
        measure.Meter(view, make_batch(rows, view), SILENT, units), "kl", units.total, 6
    )
    task, found = Task(units.free(1, 1), (1, 2, 3)), {}
    for name in methods.METHODS:
        methods.METHODS[name](task, ledger, lambda drop: found.update({len(drop): tuple(drop)}))
    labelled = [(row, row) for row in rows]
    checked = [NONE, *map(frozenset, found.values()), *list(ledger.costs)[-4:]]
    for drop in checked:
        smaller, cost = without_parts(model, units.removal(drop)), ledger.costs[drop]
        assert cost.nll == pytest.approx(plain.mean_loss(smaller, labelled), rel=1e-5)
        expected = plain.divergence(model, smaller, rows)
        assert cost.kl == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert all(unit // 2 in range(1, units.blocks - 1) for drop in ledger.costs for unit in drop)


def test_from_search_to_a_plan_of_parts(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    source, text, out = tiny_dir("gqa"), tmp_path / "text.txt", tmp_path / "parts"
    text.write_text(tiny.text(), encoding="utf-8")
    argv = ["search", str(source), "--units", "sublayer", "--counts", "2,3", "--out", str(out)]
    argv += ["--calibration", str(text), "--samples", "3", "--length", "16", "--device", "cpu"]
    assert main([*argv, "--methods", "greedy,pairs"]) == 0
    rows, summary = SetRow.read(out), Search.read(out)
    assert summary.units == "sublayer"
    assert [(row.method, row.count) for row in rows] == [
        (method, count) for method in ("greedy", "pairs") for count in (2, 3)
    ]
    assert all(len(row.units) == row.count and row.removal.units == row.count for row in rows)
    assert {row.drop for row in HeldoutRow.read(out)} >= {""}
    assert all(row.heldout_kl is not None for row in rows)
    pair = PairRow.read(out)[0]
    assert (pair.block_a, pair.part_a, pair.part_b) == (1, "attention", "mlp")

    capsys.readouterr()
    assert main(["plan", str(out), "--criterion", "best", "--count", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    best = min((row for row in rows if row.count == 3), key=lambda row: row.cost)
    assert printed["attention"] == list(best.removal.attention)
    assert printed["mlp"] == list(best.removal.mlp)
    assert printed["drop"] == list(best.removal.drop)
    assert printed["params"] == best.params
    assert main(["plan", str(out), "--criterion", "best", "--count", "5"]) == 2
    assert "no set of 5 parts found by best" in capsys.readouterr().err
    assert plan.choose(scores.load(out), "greedy", count=2).removal == rows[0].removal

    assert main([*argv, "--heal", "scale", "--dry-run"]) == 2
    assert "whole blocks, not of parts" in capsys.readouterr().err
    assert main([*argv[:4], "--counts", "99", "--dry-run", "--out", str(out)]) == 2
    assert "parts can be removed" in capsys.readouterr().err


def test_cells_of_sets():
    cell = written([3, (5, "mlp"), (4, "attention")])
    assert cell == "3 5.mlp 4.attention"
    assert units_in(cell) == (3, (5, "mlp"), (4, "attention"))
    for damaged in ("3 3", "3.head", "x", "3.", "-1"):
        assert units_in(damaged) == ()
    gone = removal_of([(5, "mlp"), 3, (5, "attention"), (6, "attention")])
    assert (gone.drop, gone.attention, gone.mlp) == ((3, 5), (6,), ())
