"""The rate that estimates use: of the run whose model is nearest in size, then of the newest."""

from __future__ import annotations

from core.runs import devices, pace
from core.runs.workspace import write_json


def make(root, name, created, rate, parameters=None, device="cpu", state="done"):
    write_json(root / name / ".run" / "spec.json", {"command": "evaluate", "spec": {}, "argv": []})
    write_json(root / name / ".run" / "status.json", {"state": state, "created": created})
    summary = {"flops_per_s": rate, "parameters": parameters, "device": device}
    write_json(root / name / "summary.json", summary)


def test_a_model_of_like_size_counts_more_than_a_newer_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    assert pace.flops_per_s("evaluate", "cpu", 10**8) is None
    make(tmp_path, "real", 1.0, 6e10, 134_000_000)
    make(tmp_path, "pruned", 2.0, 5e10, 113_000_000)
    make(tmp_path, "demo", 3.0, 4e9, 2_000_000)
    make(tmp_path, "old", 4.0, 1e9)
    make(tmp_path, "card", 5.0, 1e13, 134_000_000, device="cuda:0")
    make(tmp_path, "failed", 6.0, 1.0, 134_000_000, state="failed")
    assert pace.flops_per_s("evaluate", "cpu", 134_000_000) == 5e10  # as large, and newer
    assert pace.flops_per_s("evaluate", "cpu", 2_200_000) == 4e9
    assert pace.flops_per_s("evaluate", "cuda", 7_000_000_000) == 1e13
    assert pace.flops_per_s("evaluate", "auto", 134_000_000) == 5e10  # what auto means here
    monkeypatch.setattr(devices, "_best", lambda: "cuda:0")
    assert pace.flops_per_s("evaluate", "auto", 134_000_000) == 1e13
    assert pace.flops_per_s("evaluate", "cuda:1", 134_000_000) == 1e13  # as fast as its neighbour
    assert pace.flops_per_s("evaluate", "tpu", 134_000_000) is None
    assert pace.measured(("search", "evaluate"), "cpu", 134_000_000) == 5e10
    assert pace.flops_per_s("search", "cpu", 134_000_000) is None


def test_among_models_of_like_size_the_same_kind_of_work_counts():
    new, other, old = pace.Rate(1.0, 100, alike=False), pace.Rate(2.0, 105), pace.Rate(3.0, 100)
    assert pace.nearest([new, other, old], 100) == 2.0  # the newest of like size and kind
    assert pace.nearest([new, pace.Rate(2.0, 300)], 100) == 1.0  # size counts more than kind
    assert pace.nearest([], 100) is None
