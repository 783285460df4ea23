"""The GPU benchmark's variants have the published sizes; nothing measured is lost, by any end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu_report import MEMORY, TIME, Report
from core.benchmark import protocol
from core.benchmark.protocol import Cell, CellResult

PUBLISHED = {
    "dense": 6_738_415_616,
    "depth-6": 5_524_115_456,
    "depth-11": 4_512_198_656,
    "width-llm-pruner": 5_422_977_024,
    "width-wanda-sp": 5_470_294_016,
}
FLAP = sum(
    2 * 4096
    + 4 * 4096 * (26 + step * 4) * 128
    + 3 * 4096 * (8807 + step * 1376)
    + 2 * 4096  # the biases of both output projections
    for step in (block % 3 - 1 for block in range(32))
)
CPU = torch.device("cpu")
NAMES = [v.name for v in gpu.TINY_VARIANTS]


@pytest.mark.parametrize("shape", gpu.VARIANTS, ids=lambda s: s.name)
def test_shapes_have_the_published_parameters(shape):
    model = gpu.build(shape, gpu.LLAMA_7B, torch.device("meta"), torch.bfloat16)
    wanted = (PUBLISHED | {"width-flap": FLAP + 2 * 32000 * 4096 + 4096})[shape.name]
    assert sum(p.numel() for p in model.parameters()) == wanted
    assert model.config.num_hidden_layers == len(model.model.layers) == shape.blocks
    known = gpu.shapes_of(shape, gpu.LLAMA_7B)
    assert known.parameters == wanted
    block = model.model.layers[10]
    assert known.block_shapes[10]["heads"] * known.head_dim == block.self_attn.q_proj.out_features
    assert known.block_shapes[10]["intermediate"] == block.mlp.up_proj.out_features


def bench(folder: Path, seconds: float = 60.0, batches: tuple[int, ...] = (1, 2)) -> gpu.Bench:
    grid = protocol.cells(batches, (4,))
    shapes = {v.name: gpu.shapes_of(v, gpu.TINY) for v in gpu.TINY_VARIANTS}
    report = Report(folder, gpu.about(CPU, torch.float32, grid, gpu.TINY), shapes)
    return gpu.Bench(report, grid, CPU, time.monotonic() + seconds, 2, 1)


def run(made: gpu.Bench) -> dict:
    torch.set_num_threads(1)
    made.run(gpu.TINY_VARIANTS, gpu.TINY, torch.float32)
    made.report.save()
    return saved(made.report.folder)


def saved(folder: Path) -> dict:
    return json.loads((folder / "bench-gpu.json").read_text())


@pytest.fixture
def light(monkeypatch):
    """Generations that take no time, by the model's blocks and the batch; and made-up rates."""
    latencies: dict[tuple[int, int], float] = {}

    def timed(model, ids, config):
        found = latencies.get((len(model.model.layers), len(ids)), 0.5)
        if found == float("inf"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found, found / 4

    monkeypatch.setattr(gpu.generate, "timed", timed)
    monkeypatch.setattr(gpu.generate, "import_and_settle", lambda device: None)
    monkeypatch.setattr(gpu.rates, "measure", lambda device, dtype: gpu.analytic.Rates(1e12, 1e14))
    return latencies


def test_the_tiny_run_measures_every_point_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.rates, "measure", lambda device, dtype: gpu.analytic.Rates(1e12, 1e14))
    made = bench(tmp_path)
    visited = []
    build = gpu.build
    monkeypatch.setattr(gpu, "build", lambda s, *a: visited.append(s.name) or build(s, *a))
    found = run(made)
    assert visited == ["dense", "depth-2", "width", "width", "depth-2", "dense"]
    assert [(p["variant"], p["batch_size"]) for p in found["points"]] == [
        (name, batch) for name in NAMES for batch in (1, 2)
    ]
    assert all(p["visits"] == 2 and p["runs"] == 4 for p in found["points"])
    assert found["skipped"] == []


def test_the_table_shows_the_speed_up_at_the_same_batch(tmp_path, light):
    light |= {(6, 1): 0.8, (6, 2): 0.9, (4, 1): 0.4, (4, 2): 0.6}
    run(bench(tmp_path))
    lines = (tmp_path / "bench-gpu.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert [r.split(" | ")[7] for r in rows if r.startswith("| depth-2 |")] == ["2.00 x", "1.50 x"]
    assert len({r.count("|") for r in rows}) == 1


def test_out_of_memory_ends_the_larger_batches_only(tmp_path, light):
    light[6, 2] = float("inf")  # dense and width
    made = bench(tmp_path, batches=(1, 2, 3))
    found = run(made)
    points = {(p["variant"], p["batch_size"]): p for p in found["points"]}
    assert {k for k, p in points.items() if p["oom"]} == {("dense", 2), ("width", 2)}
    assert points["dense", 1]["runs"] == 4  # the second visit measures what fits again
    assert points["depth-2", 3]["runs"] == 4
    assert ("dense", 3) not in points
    assert {(s["variant"], s["batch_size"], s["why"]) for s in found["skipped"]} == {
        (name, batch, MEMORY) for name in ("dense", "width") for batch in (2, 3)
    }
    text = (tmp_path / "bench-gpu.md").read_text()
    assert "| dense | 242,496 | 2 | out of memory |" in text
    assert "ran out of memory: dense batch 3, width batch 3, width batch 2, dense batch 2." in text


def test_weights_that_do_not_fit_are_a_result(tmp_path, light, monkeypatch):
    from core.errors import OutOfMemoryError

    build = gpu.build

    def small(shape, *rest):
        if shape.name == "dense":
            raise OutOfMemoryError("Out of memory while making random weights: CUDA", "")
        return build(shape, *rest)

    monkeypatch.setattr(gpu, "build", small)
    found = run(bench(tmp_path))
    assert [(p["variant"], p["oom"]) for p in found["points"]] == [
        ("dense", True), *[(name, False) for name in NAMES[1:] for _ in range(2)],
    ]  # fmt: skip
    assert "| depth-2 |" in (tmp_path / "bench-gpu.md").read_text()


def test_what_takes_longer_than_is_left_is_skipped(tmp_path, light):
    slow = dict.fromkeys([(blocks, batch) for blocks in (6, 4) for batch in (2, 3)], 500.0)
    light |= slow
    found = run(bench(tmp_path, batches=(1, 2, 3)))
    measured = {(p["variant"], p["batch_size"]): p["visits"] for p in found["points"]}
    # Only where nothing as slow is known yet: dense at 2, and depth, which is fast at 1, at 3.
    fast = {(name, 1): 2 for name in NAMES}
    assert measured == {**fast, ("dense", 2): 1, ("depth-2", 3): 1}
    assert {s["why"] for s in found["skipped"]} == {TIME}
    assert f"because {TIME}: dense batch 3" in (tmp_path / "bench-gpu.md").read_text()


def test_no_time_at_all_still_writes_a_result(tmp_path, light):
    found = run(bench(tmp_path, seconds=-1.0))
    assert found["points"] == []
    assert len(found["skipped"]) == 12


def test_a_kill_loses_nothing_that_was_measured(tmp_path, light, monkeypatch):
    made = bench(tmp_path)
    counted = []

    def killed(*asked):
        on_disk = saved(tmp_path)["points"] if counted else []
        assert len(on_disk) == len(counted)
        if len(counted) == 3:
            raise KeyboardInterrupt
        counted.append(1)
        return CellResult(asked[1], asked[2], (0.5,), (0.1,), 1.0)

    monkeypatch.setattr(gpu, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        made.run(gpu.TINY_VARIANTS, gpu.TINY, torch.float32)
    assert saved(tmp_path)["state"] == "running"


def test_the_watchdog_ends_the_process_with_what_was_measured(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    made = bench(tmp_path)
    made.report.take("dense", CellResult(Cell(1, 4), 0, (0.5,), (0.1,), 1.0))
    gpu.give_up(made.report)
    assert ended == [0]
    assert saved(tmp_path)["state"] == "ended by its time limit"
    assert len(saved(tmp_path)["points"]) == 1


def test_the_time_limits_stay_within_six_minutes():
    parsed = gpu.parser().parse_args([])
    assert 60 * parsed.minutes + gpu.GRACE_S <= 5.5 * 60  # half a minute to import


def test_the_plan_adds_up_and_begins_with_latency_at_batch_1():
    minutes = gpu.parser().parse_args([]).minutes
    total = sum(stage.seconds for stage in gpu.PLAN) + gpu.RATES_S + gpu.COMPUTE_S
    assert total <= 60 * minutes
    first = gpu.PLAN[0]
    assert first.batches == (1,)
    assert first.variants == ("dense", "depth-6", "depth-11")
    assert first.generations == 3 * 2 * 3
    named = {name for stage in gpu.PLAN for name in stage.variants}
    assert named == {*PUBLISHED, "width-flap"}
    assert f"{total:.0f} of {60 * minutes:.0f} s" in gpu.plan_text(gpu.PLAN, minutes)


def test_stages_are_carried_out_in_order_within_their_shares(tmp_path, light, monkeypatch, capsys):
    light |= {(6, 1): 0.8, (4, 1): 0.4}
    monkeypatch.setattr(gpu, "compute", lambda *arguments: None)
    ends = []
    made = gpu.Bench
    report = bench(tmp_path).report
    monkeypatch.setattr(gpu, "Bench", lambda *a: ends.append(a[3]) or made(*a))
    now = time.monotonic()
    gpu.carry_out(
        gpu.TINY_PLAN, report, gpu.TINY_VARIANTS, gpu.TINY, CPU, torch.float32, 4, now + 600
    )
    whole = sum(stage.seconds for stage in gpu.TINY_PLAN) + gpu.RATES_S
    assert ends[0] - now == pytest.approx(600 * gpu.TINY_PLAN[0].seconds / whole, abs=5)
    assert len(ends) == 3
    assert all(end <= now + 600 for end in ends)
    printed = capsys.readouterr().out
    latency = "Batch 1: dense 0.800 s (5 tokens/s); depth-2 0.400 s (10 tokens/s, 2.00 x)"
    assert latency in printed.split("Throughput, dense and depth")[0]
    report.save()
    assert (tmp_path / "bench-gpu.md").read_text().splitlines()[2].startswith("- Batch 1: dense")


def test_every_computing_figure_is_measured_on_tiny_shapes(tmp_path):
    torch.set_num_threads(1)
    report = bench(tmp_path).report
    report.rates = gpu.analytic.Rates(1e12, 1e12)
    gpu.compute(report, gpu.TINY_VARIANTS[0], gpu.TINY, CPU, torch.float32, time.monotonic() + 600)
    found = dict(report.computed)
    assert not [name for name, figures in found.items() if "missing" in figures]
    assert list(found) == [
        "leave-one-out of all blocks", "leave-one-out, naive loop",
        "leave-one-out, a model built for each block", "Taylor of all blocks",
        "all pairs of blocks", "teacher's distributions, once", "LoRA, plain peft", "LoRA, ours",
        "LoRA by KL from a kept teacher", "cutting 2 blocks from the files",
    ]  # fmt: skip
    assert found["leave-one-out, naive loop"]["largest_difference"] < 1e-4
    assert found["all pairs of blocks"]["sets"] == 15
    assert all(figures["seconds"] > 0 for figures in found.values())
    assert found["LoRA, ours"]["share_of_matmul"] > 0
    report.save()
    assert saved(tmp_path)["computed"].keys() == found.keys()
    text = (tmp_path / "bench-gpu.md").read_text()
    assert "| leave-one-out of all blocks | 0." in text


def test_shares_of_the_rates_are_of_what_a_generation_reads_and_computes(tmp_path, light):
    light |= {(6, 1): 0.5}
    made = bench(tmp_path)
    made.report.rates = gpu.analytic.Rates(1e9, 1e9)
    point = next(p for p in run(made)["points"] if p["variant"] == "dense")
    weights = 242_496 - 256 * 64  # all but the embedding
    cache = 2 * 6 * 8 * 8 * (12 + 2) * 4
    assert point["shares"]["bandwidth"] == pytest.approx(4 * (4 * weights + cache) / 0.5 / 1e9)
    assert point["shares"]["matmul"] == pytest.approx(2 * weights * 16 / 0.5 / 1e9)


BARE = """
import runpy, sys
from importlib.machinery import PathFinder

ABSENT = set(sys.argv[1].split(","))

class Bare:
    '''Finds what PathFinder finds, except the packages that are said not to be installed.'''
    find_distributions = PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = ["bench.gpu", "--tiny", "--device", "cpu", "--out", sys.argv[2]]
runpy.run_module("bench.gpu", run_name="__main__")
assert not ABSENT & {name.split(".")[0] for name in sys.modules}
"""
ABSENT = (
    "pandas,pyarrow,streamlit,plotly,lm_eval,datasets,accelerate,psutil,pynvml,"
    "peft,sklearn,scipy,matplotlib,evaluate,submitit,playwright,pytest"
)


def test_it_runs_with_torch_transformers_and_safetensors_alone(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE, ABSENT, str(tmp_path)],
        cwd=Path(gpu.__file__).parents[1], env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = saved(tmp_path)
    assert found["state"] == "complete"
    assert [p["visits"] for p in found["points"]] == [2] * 6
    assert all(p["estimated_latency_s"] > 0 for p in found["points"])
    assert "| width |" in done.stdout
