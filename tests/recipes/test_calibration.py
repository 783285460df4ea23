"""Recipe calibration: the 2 x 2 is what the steps measured, on a tiny checkpoint."""

from __future__ import annotations

import csv
import json

import pytest
import tiny

from core.__main__ import main
from core.importance.agreement import spearman


def rows_of(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_each_plan_is_evaluated_on_each_text(tiny_gqa, place, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    texts = tmp_path / "a.txt", tmp_path / "b.txt"
    for number, path in enumerate(texts):  # a row is a line: long enough to calibrate on
        lines = tiny.text(900, seed=number).splitlines()
        joined = [" ".join(lines[i : i + 60]) for i in range(0, len(lines), 60)]
        path.write_text("\n".join(joined) + "\n")
    out = place.root / "grid"
    argv = ["recipe", "calibration", tiny_gqa, "--data", f"{texts[0]},{texts[1]}", "--out", out]
    assert main([str(a) for a in [*argv, "--device", "cpu"]]) == 0
    summary = json.loads((out / "summary.json").read_text())
    table = rows_of(out / "calibration.csv")
    names = [(row["calibration"], row["evaluated"]) for row in table]
    assert names == [("a.txt", "a.txt"), ("a.txt", "b.txt"), ("b.txt", "a.txt"), ("b.txt", "b.txt")]
    dense = [float(r["ppl"]) for r in rows_of(out / "evaluate-dense" / "perplexity.csv")]
    for number, row in enumerate(table):
        judged = rows_of(out / f"evaluate-{'ab'[number // 2]}" / "perplexity.csv")[number % 2]
        assert judged["source"] == str(texts[number % 2])
        assert float(row["ppl"]) == float(judged["ppl"])
        assert float(row["ratio"]) == pytest.approx(float(judged["ppl"]) / dense[number % 2])
        pruning = json.loads((out / "ab"[number // 2] / "pruning.json").read_text())
        assert row["dropped"] == " ".join(map(str, pruning["dropped"]))
    scores = [[float(r["ppl"]) for r in rows_of(out / f"scores-{n}" / "blocks.csv")] for n in "ab"]
    assert summary["figures"]["rank_agreement"] == pytest.approx(spearman(*scores))
    assert f"{float(table[1]['ratio']):.3f} x the dense perplexity" in summary["verdict"]


def test_two_texts_are_required(tiny_gqa, place, tmp_path, capsys):
    argv = [
        "recipe",
        "calibration",
        str(tiny_gqa),
        "--data",
        "one.txt",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(argv) == 2
    assert "this recipe takes two texts, got 1" in capsys.readouterr().err
