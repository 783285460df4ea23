"""Sets chosen by what they cost after healing, against prune --heal and stock transformers."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from core.__main__ import main
from core.data.calibration import sample
from core.doctor import plain
from core.heal import healing, seams
from core.importance.branches import make_batch
from core.model import loading
from core.model.blocks import BlockView
from core.prune.results import Pruning
from core.search.ledger import NONE, Cost, Group, Healed, Ledger
from core.search.methods import METHODS, Task
from core.search.results import HeldoutRow, Search, SetRow
from core.search.rows import heldout

ROWS, TOKENS = 40, 24


def test_the_numbers_are_those_of_prune(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    source, text, out = tiny_dir("gqa"), tmp_path / "text.txt", tmp_path / "sets"
    text.write_text(tiny.text(), encoding="utf-8")
    how = ["--heal", "refit", "--calibration", str(text), "--length", str(TOKENS)]
    how += ["--samples", str(ROWS), "--device", "cpu", "--dtype", "float32"]
    search = ["search", str(source), "--out", str(out), "--counts", "1-2", "--heal-best", "2"]
    search += ["--methods", "one-shot,greedy", *how]
    assert main(search) == 0
    rows, summary = SetRow.read(out), Search.read(out)
    assert [(r.method, r.count, r.heal) for r in rows] == [
        (method, count, "refit") for method in ("one-shot", "greedy") for count in (1, 2)
    ]
    assert (summary.heal, summary.tokens) == ("refit", ROWS // 4 * (TOKENS - 1))
    row = rows[-1]
    drop = ",".join(map(str, row.blocks))
    assert main(["prune", str(source), "--drop", drop, "--out", str(tmp_path / "cut"), *how]) == 0
    healed = Pruning.read(tmp_path / "cut").healing
    assert row.kl == pytest.approx(healed.kl_after, rel=1e-6)
    assert row.nll == pytest.approx(healed.nll_after, rel=1e-6)
    assert row.unhealed_kl == pytest.approx(healed.kl_before, rel=1e-6)
    assert row.kl < row.unhealed_kl

    # the held-out cost is that of the checkpoint that prune wrote, by stock transformers
    tokenizer = loading.load_tokenizer(source)
    drawn = sample(str(text), tokenizer, ROWS, TOKENS, 1234)
    others, _ = heldout(str(text), tokenizer, drawn, TOKENS, 1234)
    dense, cut = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (source, tmp_path / "cut")
    )
    with torch.no_grad():
        assert row.heldout_kl == pytest.approx(plain.divergence(dense, cut, others), rel=1e-4)
    own = [r for r in HeldoutRow.read(out) if r.drop == " ".join(map(str, sorted(row.blocks)))]
    assert (len(own), own[0].heal) == (len(others), "refit")
    assert sum(r.kl * r.tokens for r in own) / sum(r.tokens for r in own) == pytest.approx(
        row.heldout_kl, rel=1e-6
    )

    # a search that was stopped does not heal anything twice
    first = (out / "sets.csv").read_text()
    monkeypatch.setattr("core.search.measure.Healer.__call__", None)
    assert main([*search, "--resume"]) == 0
    assert (out / "sets.csv").read_text() == first
    capsys.readouterr()
    assert main([*search, "--protect-first", "0", "--dry-run"]) == 2
    assert "block 0 may be removed" in capsys.readouterr().err
    assert main([*search[:-4], "--samples", "8", "--dry-run", "--length", "24"]) == 2
    assert "Healing needs at least 640 tokens" in capsys.readouterr().err


def test_healing_changes_the_choice_and_is_limited():
    """Block 3 is the cheapest alone, block 2 after healing; block 1 is never healed."""
    plain_cost, healed_cost = {1: 3.0, 2: 2.0, 3: 1.0}, {2: 0.1, 3: 0.9}
    asked = []

    def measured(sets):
        costs = tuple(Cost(0.0, sum(plain_cost[b] for b in s)) for s in sets)
        return Group(tuple(sets), costs, 1, 0.0)

    def heal(drop):
        asked.append(drop)
        kl = sum(healed_cost[b] for b in drop)
        return Healed(Cost(0.0, kl), Cost(0.0, 9.0), 5, 0.0)

    ledger = Ledger(measured, "kl", 4, 9, heal=heal, heal_best=2)
    found = []
    METHODS["greedy"](Task((1, 2, 3), (1,)), ledger, found.append)
    METHODS["one-shot"](Task((1, 2, 3), (1,)), ledger, found.append)
    assert [tuple(drop) for drop in found] == [(2,), (3,)]
    assert asked == [{3}, {2}]
    assert ledger.passes == 1 + 2 * 5
    assert ledger.cheapest(1, (1, 2, 3)) == {2}
    assert ledger.cost_of(NONE) == ledger.costs[NONE]


@pytest.mark.parametrize("method", ["refit", "scale"])
def test_block_passes_of_healing_are_those_that_run(tiny_dir, monkeypatch, method):
    model = loading.load_model(tiny_dir("gqa"), torch.device("cpu"), torch.float32)
    view, drop, parts = BlockView(model), (1, 3), []
    ids = torch.randint(3, 320, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    attention = healing.FastBlock.attention_

    def counted(self, hidden):
        parts.append(len(hidden))
        attention(self, hidden)

    monkeypatch.setattr(healing.FastBlock, "attention_", counted)
    batch = make_batch(ids.tolist(), view)
    found = healing.heal(view, drop, batch, method)
    assert sum(parts) / ROWS == pytest.approx(seams.passes(method, drop, 5))

    # with the dense streams kept, the same numbers from fewer passes
    kept, before = healing.Kept(view, batch), len(parts)
    again = healing.heal(view, drop, batch, method, kept=kept)
    ran = sum(parts[before:]) / ROWS
    assert ran <= seams.passes(method, drop, 5, kept=True) + 1  # attention before a seam
    assert ran < 0.7 * sum(parts[:before]) / ROWS
    for name in ("kl_before", "kl_after", "nll_dense", "nll_before", "nll_after"):
        assert getattr(again, name) == pytest.approx(getattr(found, name), rel=1e-6)
    assert [seam.kept for seam in again.seams] == [seam.kept for seam in found.seams]
    for name, change in found.tensors.items():
        old = view.tensor(name)
        torch.testing.assert_close(again.tensors[name](old), change(old), rtol=1e-5, atol=1e-7)


def test_parts_are_chosen_after_healing(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    source, text, out = tiny_dir("gqa"), tmp_path / "text.txt", tmp_path / "sets"
    text.write_text(tiny.text(), encoding="utf-8")
    how = ["--heal", "refit", "--calibration", str(text), "--length", str(TOKENS)]
    how += ["--samples", str(ROWS), "--device", "cpu", "--dtype", "float32"]
    search = ["search", str(source), "--out", str(out), "--units", "sublayer", "--counts", "2"]
    assert main([*search, "--methods", "greedy", *how]) == 0
    (row,) = SetRow.read(out)
    what = []
    for name in ("drop", "attention", "mlp"):
        blocks = getattr(row.removal, name)
        what += [f"--{name}", ",".join(map(str, blocks))] if blocks else []
    assert main(["prune", str(source), *what, "--out", str(tmp_path / "cut"), *how]) == 0
    healed = Pruning.read(tmp_path / "cut").healing
    assert row.kl == pytest.approx(healed.kl_after, rel=1e-6)
    assert row.unhealed_kl == pytest.approx(healed.kl_before, rel=1e-6)
