"""The analytic model against real tensors, and its independence of torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from core.benchmark import analytic
from core.benchmark.results import known_rates
from core.checkpoint import headers
from core.model.loading import load_model
from core.runs.workspace import Workspace, write_json

RATES = analytic.Rates(1e9, 1e12)


@pytest.mark.parametrize("variant", ["mha", "gqa", "tied", "mistral", "qwen2", "qwen3"])
def test_weights_and_cache_are_exact(tiny_dir, variant):
    folder = tiny_dir(variant)
    info = headers.inspect(folder)
    model = load_model(folder, torch.device("cpu"), torch.float32)
    weights = {p.data_ptr(): p.numel() * 4 for p in model.parameters()}
    assert analytic.weight_bytes(info, "float32") == sum(weights.values())
    assert analytic.weight_bytes(info, "bfloat16") * 2 == sum(weights.values())
    with torch.no_grad():  # 9 tokens: within the sliding windows of these checkpoints
        cache = model(torch.ones(3, 9, dtype=torch.long)).past_key_values
    real = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert analytic.kv_bytes(info, 3, 9, "float32") == real


def test_reading_bound_latency_is_bytes_over_bandwidth(tiny_dir):
    info = headers.inspect(tiny_dir("gqa"))
    embedding = info.vocab * info.hidden
    cache = 3 * analytic.kv_bytes(info, 1, 20, "float32")  # read, copied when it grows, read
    read = (info.parameters - embedding) * 4 + cache
    slow = analytic.Rates(1e6, 1e18)
    assert analytic.step_s(info, slow, 1, 20) == pytest.approx(read / 1e6)


def test_a_step_costs_its_overheads_and_grows_with_the_batch(tiny_dir):
    info = headers.inspect(tiny_dir("gqa"))
    plain = analytic.step_s(info, RATES, 1, 20)
    more = analytic.Rates(1e9, 1e12, block_overhead_s=0.5, step_overhead_s=2.0)
    assert analytic.step_s(info, more, 1, 20) - plain == pytest.approx(2.0 + 0.5 * info.blocks)
    assert analytic.latency_ms(info, RATES, 64) > analytic.latency_ms(info, RATES, 1)


def test_activations_and_the_generation_itself_cost_what_was_measured(tiny_dir):
    info = headers.inspect(tiny_dir("gqa"))
    a_block = 12 * 32 + 6 * (4 + 2) * 8 + 3 * 48
    assert analytic.activations(info) == info.blocks * a_block
    dear = analytic.Rates(1e9, 1e12, activation_s=1e-3, generation_overhead_s=7.0)
    more = analytic.step_s(info, dear, 5, 20, 2) - analytic.step_s(info, RATES, 5, 20, 2)
    assert more == pytest.approx(1e-3 * 5 * 2 * info.blocks * a_block)
    gain = analytic.latency_s(info, dear, 1, 4, 3) - analytic.latency_s(info, RATES, 1, 4, 3)
    assert gain == pytest.approx(7.0 + 1e-3 * (4 + 2) * info.blocks * a_block)


H200 = {(32, 1): 4.881, (32, 16): 4.622, (32, 64): 4.655, (26, 1): 3.567, (26, 16): 3.880,
        (26, 64): 3.865, (21, 1): 2.876, (21, 16): 3.258, (21, 64): 3.028}  # fmt: skip
"""Seconds that an H200 took for 128 tokens after 12, by blocks of LLaMA-7B and batch (bfloat16)."""


def test_a_gpu_computes_while_the_host_launches():
    """The batch hardly matters until computing takes longer than launching: measured so."""
    kept = {"heads": 32, "kv_heads": 32, "intermediate": 11008}
    table, per_block = 32000 * 4096, 4096 * (4 * 4096 + 3 * 11008 + 2)

    def shapes(blocks):
        parts = {"embedding": table, "blocks": blocks * per_block, "norm": 4096, "head": table}
        whole = sum(parts.values())
        return analytic.BlocksLeft(4096, 32000, 128, False, whole, parts, (kept,) * blocks)

    # bytes, operations and elements a second as doctor measured them; launches: 1.12 ms a block
    gpu = analytic.Rates(
        3.744e12, 6.813e14, 1.12e-3, activation_s=1.1e-12, dtype="bfloat16", asynchronous=True
    )
    pairs = [(analytic.latency_s(shapes(n), gpu, b), real) for (n, b), real in H200.items()]
    assert analytic.errors(pairs).worst_error_pct < 10
    added = dataclasses.replace(gpu, asynchronous=False)
    pairs = [(analytic.latency_s(shapes(n), added, b), real) for (n, b), real in H200.items()]
    assert analytic.errors(pairs).worst_error_pct > 15
    launched = 128 * 32 * gpu.block_overhead_s
    assert analytic.latency_s(shapes(32), gpu, 1) == pytest.approx(launched)
    assert analytic.latency_s(shapes(32), gpu, 4096) > 2 * launched


def test_rates_of_a_gpu_are_taken_with_what_it_hides_from_the_host(monkeypatch):
    """Emulated on the CPU: launches of 2 ms a block and 1 ms a step, whatever the batch."""
    from core.benchmark import rates

    asked = []

    class Probe:
        def __init__(self, blocks, device, dtype):
            self.blocks = blocks

        def seconds(self, batch):
            asked.append(batch)
            step = 1e-3 + 2e-3 * self.blocks
            return step + 5e-3, step

    monkeypatch.setattr(rates, "_Probe", Probe)
    start = analytic.Rates(1e12, 1e14, activation_s=1e-12, asynchronous=True)
    found = rates._overheads(start, torch.device("cuda"), torch.bfloat16)
    assert found.block_overhead_s == pytest.approx(2e-3)
    assert found.step_overhead_s == pytest.approx(1e-3)
    assert found.generation_overhead_s == pytest.approx(5e-3)
    assert found.activation_s == 1e-12  # noise of the launches would be 1000 times this
    assert set(asked) == {1}


def test_blocks_of_their_own_shapes_cost_what_each_has(tiny_dir):
    info = headers.inspect(tiny_dir("gqa"))
    narrow = dataclasses.replace(
        info, block_shapes=({**info.block_shapes[0], "kv_heads": 1}, *info.block_shapes[1:])
    )
    saved = 2 * info.head_dim * 3 * 9 * 4
    wide = analytic.kv_bytes(info, 3, 9, "float32")
    assert wide - analytic.kv_bytes(narrow, 3, 9, "float32") == saved


def test_rates_are_found_in_the_workspace_by_device_and_precision(tmp_path):
    where = Workspace(tmp_path)
    for name, created, value in (("old", 1, 1.0), ("new", 2, 2.0), ("other", 3, 3.0)):
        book = tmp_path / name / ".run"
        book.mkdir(parents=True)
        write_json(book / "spec.json", {"command": "benchmark", "spec": {}})
        write_json(book / "status.json", {"state": "done", "created": created})
        rates = {"bandwidth_bytes_per_s": value, "matmul_flops_per_s": 1.0, "dtype": "float32"}
        device = "cuda" if name == "other" else "cpu"
        later = {"unknown_field": 1}
        write_json(tmp_path / name / "summary.json", {"device": device, "rates": rates | later})
    assert known_rates(where, "cpu", "float32").bandwidth_bytes_per_s == 2.0
    assert known_rates(where, "cuda", "float32").bandwidth_bytes_per_s == 3.0
    assert known_rates(where, "cpu", "bfloat16") is None
    one, other = analytic.Rates(1.0, 2.0, 3.0), analytic.Rates(3.0, 4.0, 5.0)
    assert analytic.mean_rates([one, other]) == analytic.Rates(2.0, 3.0, 4.0)
    gpu = dataclasses.replace(one, dtype="bfloat16", asynchronous=True)
    assert analytic.mean_rates([gpu, gpu]) == gpu


def test_largest_batch_is_the_last_that_fits(tiny_dir):
    info = headers.inspect(tiny_dir("gqa"))
    capacity = 3 * 2**20
    batch = analytic.largest_batch(info, capacity, 12, 64, "float32")
    assert batch > 1
    assert analytic.memory_bytes(info, batch, 12, 64, "float32")["total"] <= capacity
    assert analytic.memory_bytes(info, batch + 1, 12, 64, "float32")["total"] > capacity
    assert analytic.largest_batch(info, 10, 12, 64, "float32") == 0


def test_errors_are_median_and_worst():
    found = analytic.errors([(1.1, 1.0), (0.5, 1.0), (2.0, 2.0)])
    assert found.median_error_pct == pytest.approx(10)
    assert found.worst_error_pct == pytest.approx(50)
    assert found.rough is False
    assert analytic.errors([(2.0, 1.0)]).rough is True
    assert analytic.errors([]).median_error_pct is None


def test_no_torch_is_imported():
    code = (
        "import sys, core.benchmark.analytic, core.benchmark.command, core.benchmark.protocol;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
