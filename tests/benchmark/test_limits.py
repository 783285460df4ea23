"""Limits of a GPU in the benchmark, and names of the cache; a fake model stands for the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from core.benchmark import generate, worker


def visit(limit, error):
    """A visit whose device takes up to ``limit`` sequences; more raise ``error``."""
    events = []
    made = worker.Visit.__new__(worker.Visit)
    made.device = torch.device("cpu")
    made.request = SimpleNamespace(cells=((1, 4),))
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
    ("limit", "error", "largest", "fails_at"),
    [
        (65535, "unreached", 65535, 65536),
        (40000, "CUDA error: invalid configuration argument", range(38000, 40001), None),
        (3, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", 3, 4),
    ],
)
def test_the_largest_batch(monkeypatch, limit, error, largest, fails_at):
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


def test_another_error_of_the_device_is_not_a_limit():
    made, _, work = visit(0, "CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        made.fits(lambda: work(1))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_model_takes(name):
    space = {}
    exec(f"def forward(input_ids, {name}=None, use_cache=None, **more): ...", space)
    model = SimpleNamespace(forward=space["forward"])
    assert generate.cache_name(model) == name
    taken = []

    def call(ids, *, use_cache, logits_to_keep, **held):
        taken.append(held)
        return {name: len(taken)}

    made = worker.Visit.__new__(worker.Visit)
    made.model = type("M", (), {"forward": model.forward, "__call__": staticmethod(call)})()
    made.model.forward = model.forward
    assert made.fill(torch.ones(1, 4, dtype=torch.long), 10) == 3
    assert taken == [{name: None}, {name: 1}, {name: 2}]
