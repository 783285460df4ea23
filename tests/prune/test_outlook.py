"""Sizes and known perplexities, against loaded models and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from core.checkpoint import headers
from core.prune.outlook import CurvePoint, curve_points, outlook, quality, same_text
from core.prune.score_results import Curve, Importance
from core.runs import workspace


def test_sizes_are_those_of_the_model_without_the_blocks(tiny_gqa):
    import torch
    from transformers import AutoModelForCausalLM

    info = headers.inspect(tiny_gqa)
    found = outlook(info, (3, 1), batch=2, context=24, dtype="float16")

    model = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float16)
    kept = [b for i, b in enumerate(model.model.layers) if i not in (1, 3)]
    model.model.layers = torch.nn.ModuleList(kept)
    for at, block in enumerate(kept):
        block.self_attn.layer_idx = at
    model.config.num_hidden_layers = len(kept)
    dense = headers.inspect(tiny_gqa).parameters
    left = sum(p.numel() for p in model.parameters())
    assert found.parameters == left
    assert found.ratio == pytest.approx(1 - left / dense)
    assert found.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    cache = model(torch.ones(2, 24, dtype=torch.long), use_cache=True).past_key_values
    held = sum(
        layer.keys.numel() * layer.keys.element_size()
        + layer.values.numel() * layer.values.element_size()
        for layer in cache.layers
    )
    assert found.kv_bytes == held
    assert found.blocks == 3


def test_no_blocks_and_all_blocks_have_sizes_too(tiny_gqa):
    info = headers.inspect(tiny_gqa)
    whole = outlook(info, (), batch=1, context=10, dtype="float32")
    assert whole.parameters == info.parameters
    assert whole.kv_bytes == info.kv_bytes(1, 10, "float32")
    none = outlook(info, range(info.blocks), batch=1, context=10, dtype="float32")
    assert (none.blocks, none.kv_bytes) == (0, 0)


def test_what_is_measured_is_told_from_what_is_estimated():
    without = [40.0, 10.0, 12.0, None]
    points = [CurvePoint("ppl", 2, 17.0, (2, 1), "curve-1")]
    known = {
        drop: quality(drop, 8.0, without, points, "run")
        for drop in ((), (1,), (1, 2), (0, 1), (1, 3))
    }
    assert (known[()].ppl, known[()].kind) == (8.0, "measured")
    assert (known[1,].ppl, known[1,].kind, known[1,].source) == (10.0, "measured", "run")
    assert (known[1, 2].ppl, known[1, 2].kind, known[1, 2].source) == (17.0, "measured", "curve-1")
    assert known[0, 1].kind == "estimated"
    assert known[0, 1].ppl == pytest.approx(40.0 * 10.0 / 8.0)
    assert known[1, 3] is None


def test_hopeless_values_give_no_estimate():
    assert quality((0, 1), 8.0, [math.inf, 9.0]) is None
    assert quality((0, 1), 8.0, [math.nan, 9.0]) is None
    assert quality((0, 1), None, [9.0, 9.0]) is None
    assert quality((0, 7), 8.0, [9.0]) is None
    assert quality(tuple(range(8)), 8.0, [1e200] * 8) is None


def test_a_curve_run_is_read_with_its_drops(tmp_path):
    (tmp_path / "curve.csv").write_text(
        "criterion,count,ratio,params,ppl\nppl,0,0.0,100,8.0\nppl,2,0.1,90,17.5\n"
    )
    workspace.write_json(tmp_path / "summary.json", {"drops": {"ppl 2": [4, 2]}})
    points = curve_points(tmp_path)
    assert [(p.criterion, p.count, p.ppl, p.drop) for p in points] == [
        ("ppl", 0, 8.0, ()),
        ("ppl", 2, 17.5, (4, 2)),
    ]
    assert curve_points(tmp_path / "nothing") == []


def test_runs_on_other_text_are_not_mixed():
    one = {"checkpoint_key": "k", "calibration": "demo", "samples": 10, "length": 128, "seed": 1}
    run = Importance(**one)
    assert same_text(run, Curve(**{**one, "dense_ppl": 3.0}))
    assert not same_text(run, Curve(**{**one, "length": 64}))
    assert not same_text(run, Curve(**{**one, "checkpoint_key": "other"}))
