"""The analytic model against real tensors, and its independence of torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from core import checkpoint
from core.benchmark import analytic
from core.model import load_model

RATES = analytic.Rates(1e9, 1e12)


@pytest.mark.parametrize("variant", ["mha", "gqa", "tied", "mistral", "qwen2", "qwen3"])
def test_weights_and_cache_are_exact(tiny_dir, variant):
    folder = tiny_dir(variant)
    info = checkpoint.inspect(folder)
    model = load_model(folder, torch.device("cpu"), torch.float32)
    weights = {p.data_ptr(): p.numel() * 4 for p in model.parameters()}
    assert analytic.weight_bytes(info, "float32") == sum(weights.values())
    assert analytic.weight_bytes(info, "bfloat16") * 2 == sum(weights.values())
    with torch.no_grad():  # 9 tokens: within the sliding windows of these checkpoints
        cache = model(torch.ones(3, 9, dtype=torch.long)).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert analytic.kv_bytes(info, 3, 9, "float32") == real


def test_reading_bound_latency_is_bytes_over_bandwidth(tiny_dir):
    info = checkpoint.inspect(tiny_dir("gqa"))
    embedding = info.vocab * info.hidden
    read = (info.parameters - embedding) * 4 + analytic.kv_bytes(info, 1, 20, "float32")
    slow = analytic.Rates(1e6, 1e18)
    assert analytic.step_s(info, slow, 1, 20) == pytest.approx(read / 1e6)


def test_a_step_costs_its_overheads_and_grows_with_the_batch(tiny_dir):
    info = checkpoint.inspect(tiny_dir("gqa"))
    plain = analytic.step_s(info, RATES, 1, 20)
    more = analytic.Rates(1e9, 1e12, block_overhead_s=0.5, step_overhead_s=2.0)
    assert analytic.step_s(info, more, 1, 20) - plain == pytest.approx(2.0 + 0.5 * info.blocks)
    assert analytic.latency_ms(info, RATES, 64) > analytic.latency_ms(info, RATES, 1)


def test_largest_batch_is_the_last_that_fits(tiny_dir):
    info = checkpoint.inspect(tiny_dir("gqa"))
    capacity = 3 * 2**20
    batch = analytic.largest_batch(info, capacity, 12, 64, "float32")
    assert batch > 1
    assert analytic.memory_bytes(info, batch, 12, 64, "float32")["total"] <= capacity
    assert analytic.memory_bytes(info, batch + 1, 12, 64, "float32")["total"] > capacity
    assert analytic.largest_batch(info, 10, 12, 64, "float32") == 0


def test_errors_are_median_and_worst():
    found = analytic.errors([(1.1, 1.0), (0.5, 1.0), (2.0, 2.0)])
    assert found["median_error_pct"] == pytest.approx(10)
    assert found["worst_error_pct"] == pytest.approx(50)
    assert found["rough"] is False
    assert analytic.errors([(2.0, 1.0)])["rough"] is True
    assert analytic.errors([])["median_error_pct"] is None


def test_no_torch_is_imported():
    code = (
        "import sys, core.benchmark.analytic, core.benchmark.command, core.benchmark.protocol;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
