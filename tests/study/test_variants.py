"""The tree of variants, from run directories as prune leaves them."""

from __future__ import annotations

import json

from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import lineage


def make_run(root, name, command, source, *, started, dropped=(), size=0):
    folder = root / name
    (folder / ".run").mkdir(parents=True)
    spec = {"checkpoint": str(source), "drop": list(dropped), "out": str(folder)}
    workspace.write_json(folder / ".run" / "spec.json", {"command": command, "spec": spec})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": started})
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    (folder / "model.safetensors").write_bytes(b"0" * size)
    workspace.write_json(
        folder / "pruning.json",
        {"dropped": list(dropped), "blocks_after": 4, "parameters_after": 77, "ratio": 0.25},
    )
    return folder


def test_variants_hang_below_what_they_were_made_from(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "work"))
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({"num_hidden_layers": 6}))
    root = tmp_path / "work"
    first = make_run(root, "first", "prune", dense, started=1, dropped=(3, 1), size=1000)
    make_run(root, "second", "prune", "first", started=2, dropped=(0,), size=500)
    make_run(root, "third", "retrain", first / "merged", started=3)
    make_run(root, "other", "prune", "owner/model", started=4)
    make_run(root, "scores", "importance", dense, started=5)

    roots = lineage.lineages(Workspace(root).runs())

    shape = [
        (depth, v.record.id if v.record else v.label) for top in roots for depth, v in top.walk()
    ]
    assert shape == [
        (0, "dense"),
        (1, "first"),
        (2, "second"),
        (2, "third"),
        (0, "owner/model"),
        (1, "other"),
    ]
    assert roots[0].dense.blocks == 6
    found = roots[0].children(roots[0].dense)[0]
    assert (found.dropped, found.blocks, found.parameters, found.ratio) == ((3, 1), 4, 77, 0.25)
    real = sum(p.stat().st_size for p in first.rglob("*") if p.is_file())
    assert found.disk_bytes == real > 1000
    assert roots[0].total_bytes == sum(v.disk_bytes for _, v in roots[0].walk(found))


def test_only_cuts_of_the_checkpoint_and_of_its_variants_are_made_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text("{}")
    first = make_run(tmp_path, "first", "prune", dense, started=1)
    (first / "config.json").write_text("{}")
    make_run(tmp_path, "again", "prune", "first", started=3)
    make_run(tmp_path, "narrow", "width", dense, started=2)
    make_run(tmp_path, "tuned", "retrain", "first", started=4)
    make_run(tmp_path, "other", "prune", "owner/model", started=5)
    runs = Workspace(tmp_path).runs()
    found = {
        name: [r.id for r in lineage.made_from(runs, name)]
        for name in (str(dense), "first", "owner/model", "tuned", "demo")
    }
    assert found == {
        str(dense): ["again", "narrow", "first"], "first": ["again"], "owner/model": ["other"],
        "tuned": [], "demo": [],
    }  # fmt: skip


def test_a_variant_of_a_deleted_run_is_still_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    make_run(tmp_path, "child", "prune", tmp_path / "gone", started=1)
    (top,) = lineage.lineages(Workspace(tmp_path).runs())
    assert top.dense.record is None
    assert top.dense.folder is None
    assert [v.id for v in top.children(top.dense)] == ["child"]
