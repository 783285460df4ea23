"""Charts with little to show: one batch size, and what a narrower model keeps of each block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from core.charts import checkpoint, compare
from core.compare.candidates import Candidate
from core.compare.measured import Cost


def test_one_batch_size_makes_bars_and_two_make_lines():
    dense = Candidate("d", "demo", "dense", ratio=0.0)
    cut = Candidate("c", "cut", "depth", "ppl", ratio=0.5)
    costs = [
        Cost(id=c.id, variant=c.label, batch_size=1, latency_s_p50=t, estimated=t < 1)
        for c, t in ((dense, 2.0), (cut, 0.5))
    ]
    figure = compare.against(costs, [dense, cut], "latency_s_p50")
    assert [(t.type, *t.x, *t.y) for t in figure.data] == [
        ("bar", 2.0, "demo"),
        ("bar", 0.5, "cut, estimated"),
    ]
    assert [row["candidate"] for row in compare.data_of(figure)] == ["d", "c"]
    more = [*costs, Cost(id="d", variant="demo", batch_size=4, latency_s_p50=3.0)]
    assert {t.type for t in compare.against(more, [dense, cut], "latency_s_p50").data} == {
        "scatter"
    }


def test_what_is_left_of_every_block_adds_up():
    dense, own = (SimpleNamespace(block_parameters=p) for p in ((100, 200, 50), (100, 150, 10)))
    kept, removed = checkpoint.kept_bars(dense, own).data
    assert kept.y == pytest.approx((1.0, 0.75, 0.2))
    assert removed.y == pytest.approx((0.0, 0.25, 0.8))
