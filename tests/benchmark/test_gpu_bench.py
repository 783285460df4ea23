"""The GPU benchmark's variants have the published sizes, and the script works on any device."""

from __future__ import annotations

import time

import pytest
import torch

from bench import gpu
from core.benchmark import protocol

PUBLISHED = {
    "dense": 6_738_415_616,
    "depth-6": 5_524_115_456,
    "depth-11": 4_512_198_656,
    "width-llm-pruner": 5_422_977_024,
    "width-wanda-sp": 5_470_294_016,
}


@pytest.mark.parametrize("shape", gpu.VARIANTS, ids=lambda s: s.name)
def test_shapes_have_the_published_parameters(shape):
    model = gpu.build(shape, gpu.LLAMA_7B, torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[shape.name]


def test_the_tiny_run_measures_every_point_twice():
    torch.set_num_threads(1)
    rows, parameters, order = gpu.collect(
        gpu.TINY_VARIANTS, gpu.TINY, protocol.cells((1, 2), (4,)), torch.device("cpu"),
        torch.float32, time.monotonic() + 60, 2, 1,
    )  # fmt: skip
    assert order == ["dense", "depth-2", "width", "width", "depth-2", "dense"]
    assert all(p["visits"] == 2 and p["runs"] == 4 for points in rows.values() for p in points)
    text = gpu.table(rows, parameters).splitlines()
    dense, depth = rows["dense"][0], rows["depth-2"][0]
    gain = dense["latency_s_mean"] / depth["latency_s_mean"]
    line = next(t for t in text if t.startswith("| depth-2 |"))
    assert f"| {gain:.2f} x |" in line
    assert len({t.count("|") for t in text}) == 1
