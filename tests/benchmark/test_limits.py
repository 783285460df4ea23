"""Limits of a GPU in the benchmark, and names of the cache; a fake model stands for the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from core.benchmark import command, generate, protocol, worker
from core.benchmark.protocol import Cell, CellResult
from core.model import caching


def visit(limit, error):
    """A visit whose device takes up to ``limit`` sequences; more raise ``error``."""
    events = []
    made = worker.Visit.__new__(worker.Visit)
    made.device = torch.device("cpu")
    made.request = SimpleNamespace(cells=((1, 4),), search_limit_s=None)
    made.emit = lambda event, **values: events.append((event, values))
    made.model = None

    def work(batch):
        if batch > limit:
            raise RuntimeError(error)
        return True

    made.holds = lambda batch, output: made.fits(lambda: work(batch))[0]
    made.prompts = lambda batch: batch
    return made, events, work


@pytest.mark.parametrize(
    ("limit", "error", "largest", "fails_at", "why"),
    [
        (65535, "unreached", 65535, 65536, "kernels"),
        (40000, "CUDA error: invalid configuration argument", range(38000, 40001), None, "kernels"),
        (3, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", 3, 4, "memory"),
        (0, "can't start new thread", 0, 1, "memory"),
    ],
)
def test_the_largest_batch(monkeypatch, limit, error, largest, fails_at, why):
    made, events, work = visit(limit, error)
    monkeypatch.setattr(generate, "force_length", lambda *_: None)
    monkeypatch.setattr(generate, "timed", lambda model, batch, config: work(batch))
    monkeypatch.setattr("core.model.memory.free_memory", lambda device: None)
    made.largest(1)
    found = events[-1][1]
    wanted = largest if isinstance(largest, range) else [largest]
    assert found["batch_size"] in wanted
    assert found["fails_at"] > limit
    assert fails_at in (None, found["fails_at"])
    assert (found["limit"], found["confirmed"]) == (why, True)


def test_the_search_ends_before_a_try_that_would_exceed_its_time(monkeypatch):
    """A try takes 10 ms a sequence here; a whole generation 40 ms, by the measured cell."""
    now = [0.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    made, events, _ = visit(1 << 20, "unreached")
    made.request.search_limit_s = 1.0
    made.slowest_s = 0.04
    tried = []

    def holds(batch, output):
        tried.append(batch)
        now[0] += 0.01 * batch
        return True

    made.holds = holds
    monkeypatch.setattr(generate, "force_length", lambda *_: None)
    monkeypatch.setattr(generate, "timed", lambda *_: tried.append("generation"))
    made.largest(1)
    # 1 + 2 + ... + 32 sequences take 0.63 s; 64 more would end at 1.27 s
    assert tried == [1, 2, 4, 8, 16, 32]
    assert events[-1][1] == {
        "batch_size": 32, "fails_at": None, "output_tokens": 4, "limit": "time", "confirmed": False,
    }  # fmt: skip


def test_a_launch_limit_is_not_called_a_lack_of_memory(monkeypatch):
    made, events, work = visit(4, "canUse32BitIndexMath(input) INTERNAL ASSERT FAILED")
    made.request.cells = ((1, 4), (8, 4), (16, 4))
    made.measure = lambda cell: {"latencies_s": [float(work(cell.batch_size))]}
    monkeypatch.setattr("core.model.memory.free_memory", lambda device: None)
    made.measured = []
    assert made.cells() == 1
    found = {e["batch_size"]: e["limit"] for kind, e in events if kind == "result"}
    assert found == {1: "", 8: "kernels"}
    logged = []
    work = SimpleNamespace(finish=lambda variant, cells: None)
    session = SimpleNamespace(done=0, progress=SimpleNamespace(log=logged.append), work=work)
    variant = SimpleNamespace(name="v", results={})
    for limit in ("kernels", "memory"):
        result = CellResult(Cell(8, 4), 0, oom=True, limit=limit)
        command.Session._take(session, variant, result)
    assert logged == [
        "v, batch 8: too large for the GPU's kernels, whatever its memory.",
        "v, batch 8: out of memory.",
    ]
    point = protocol.point("v", 12, [CellResult(Cell(8, 4), 0, oom=True, limit="kernels")])
    assert point.why_unmeasured.startswith("too large for the GPU's kernels")


def test_another_error_of_the_device_is_not_a_limit():
    made, _, work = visit(0, "CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        made.fits(lambda: work(1))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_model_takes(name):
    space = {}
    exec(f"def forward(input_ids, {name}=None, use_cache=None, **more): ...", space)
    model = SimpleNamespace(forward=space["forward"])
    assert caching.cache_name(model) == name
    taken = []

    def call(ids, *, use_cache, logits_to_keep, **held):
        taken.append(held)
        return {name: len(taken)}

    made = worker.Visit.__new__(worker.Visit)
    made.model = type("M", (), {"forward": model.forward, "__call__": staticmethod(call)})()
    made.model.forward = model.forward
    assert made.fill(torch.ones(1, 4, dtype=torch.long), 10) == 3
    assert taken == [{name: None}, {name: 1}, {name: 2}]
