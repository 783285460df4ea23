"""Importance and curve files: the columns of the contract, and old runs still open."""

from __future__ import annotations

import json

from core.prune import score_results as files
from core.prune.known import measured_on
from core.prune.outlook import curve_points


def test_the_tables_have_the_columns_of_the_contract():
    kinds = (files.BlockRow, files.WeightRow, files.SampleRow, files.AngularRow, files.CurveRow)
    assert {kind.FILE: ",".join(kind.columns()) for kind in kinds} == {
        "blocks.csv": "block,ppl,taylor,magnitude,block_influence,relative_update,kl",
        "weights.csv": "name,block,module,taylor,magnitude",
        "samples.csv": "block,sample,nll",
        "angular.csv": "start,length,distance",
        "curve.csv": "criterion,count,ratio,params,ppl",
    }


def test_a_run_without_newer_fields_opens(tmp_path):
    about = {"dense_ppl": 12, "calibration": "a/b.txt", "samples": 10, "length": 64, "seed": 1,
             "device": "cpu", "dtype": "float32", "versions": ["?"]}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(about))
    (tmp_path / "blocks.csv").write_text("block,ppl\n0,13.5\n1,\n")
    found = files.Importance.read(tmp_path)
    assert (found.dense_ppl, found.versions, found.flops_per_s) == (12.0, {}, None)
    assert measured_on(found) == "Measured: b.txt, 10 x 64 tokens, seed 1, cpu, float32."
    assert measured_on(files.Importance()) == ""
    assert files.BlockRow.read(tmp_path) == (files.BlockRow(0, 13.5), files.BlockRow(1))


def test_a_curve_knows_the_blocks_of_each_plan(tmp_path):
    drops = {files.plan_key("taylor", 2): [4, 1]}
    (tmp_path / "summary.json").write_text(json.dumps({"drops": drops}))
    (tmp_path / "curve.csv").write_text(
        "criterion,count,ratio,params,ppl\ntaylor,2,0.1,90,17.5\ntaylor,3,0.2,80,\n"
    )
    (point,) = curve_points(tmp_path)
    assert (point.drop, point.ppl, point.run) == ((4, 1), 17.5, tmp_path.name)
    assert files.Curve.read(tmp_path).drop_of("ppl", 2) == ()


def test_a_damaged_summary_breaks_nothing(tmp_path):
    (tmp_path / "summary.json").write_text('{"drops": [1], "protected": "0", "samples": true}')
    assert files.Curve.read(tmp_path) == files.Curve()
    assert files.Importance.read(tmp_path) == files.Importance()
