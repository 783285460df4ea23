"""The order of visits, how runs become points, and the forced length of a generation."""

from __future__ import annotations

import os
import statistics
import time

import numpy
import pytest
import tiny
import torch

from core.benchmark import generate, meter, protocol, worker
from core.benchmark.protocol import Cell, CellResult
from core.benchmark.results import Point
from core.benchmark.utilisation import UtilisationSampler

CONTRACT = (
    "variant, batch_size, input_tokens, output_tokens, latency_s_mean, latency_s_std, "
    "latency_s_p50, first_token_s, tokens_per_s, peak_memory_mib, utilisation_pct, oom, runs"
)


def test_columns_begin_with_the_contract():
    assert ", ".join(Point.columns()).startswith(CONTRACT)


def test_visits_are_reversed_and_share_the_runs():
    order = protocol.visit_order(["a", "b", "c"], 3)
    assert [n for _, n in order] == list("abccbaabc")
    assert [protocol.share(20, 3, v) for v in range(3)] == [7, 7, 6]


def test_percentiles_equal_numpy():
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    for at in (0.1, 0.5, 0.9):
        assert protocol.percentile(values, at) == pytest.approx(numpy.quantile(values, at))


def test_a_point_is_over_all_runs_of_all_visits():
    cell = Cell(4, 11)
    visits = [
        CellResult(cell, 0, (1.0, 2.0), (0.1, 0.2), 5.0, None, 50.0, (10.0, 30.0)),
        CellResult(cell, 1, (3.0, 6.0), (0.3, 0.4), 7.0, None, 40.0, (50.0,)),
    ]
    row = protocol.point("v", 12, visits)
    assert row.latency_s_mean == 3.0
    assert row.latency_s_std == pytest.approx(statistics.stdev([1, 2, 3, 6]))
    assert row.tokens_per_s == pytest.approx(4 * 11 / 3.0)
    assert row.per_token_s == pytest.approx((3.0 - 0.25) / 10)
    assert (row.peak_memory_mib, row.process_mib, row.reserved_mib) == (7.0, 50.0, None)
    assert (row.utilisation_pct, row.utilisation_max_pct) == (30.0, 50.0)
    assert (row.runs, row.oom) == (4, False)
    full = protocol.point("v", 12, [*visits, CellResult(cell, 2, oom=True)])
    assert full.oom is True
    assert full.latency_s_mean is None


def test_without_counted_tensors_what_the_allocator_held_is_the_peak():
    cell = Cell(1, 2)
    counted = CellResult(cell, 0, (1.0,), (0.5,), 3.0, 4.0, 50.0)
    held = CellResult(cell, 1, (1.0,), (0.5,), None, 5.0, 50.0)
    both, one = (protocol.point("v", 12, rs) for rs in ([counted, held], [held]))
    assert (both.peak_memory_mib, both.reserved_mib) == (3.0, 5.0)
    assert (one.peak_memory_mib, one.reserved_mib) == (5.0, 5.0)


def test_tensors_are_counted_at_their_peak():
    kept = []

    def work():
        first = torch.zeros(1000)
        both = first.repeat(3)  # 4,000 and 12,000 bytes at once
        del first, both
        kept.append(torch.zeros(500))

    assert meter.tensor_peak(work) == pytest.approx(16000, abs=99)
    found = meter.tensor_peak(work, before=lambda: kept.append(torch.zeros(2000)))
    assert found == pytest.approx(24000, abs=99)
    # what `before` had at most and freed again does not count
    assert meter.tensor_peak(lambda: None, before=lambda: float(torch.zeros(10**6).sum())) < 1000


@pytest.mark.parametrize(("batch", "output"), [(1, 9), (3, 30), (2, 1)])
def test_the_ends_of_a_generation_take_what_the_whole_does(batch, output):
    visit = object.__new__(worker.Visit)
    visit.model, visit.device, visit.ids = tiny.model("gqa"), torch.device("cpu"), [5, 7, 9, 11]
    ids, config = visit.prompts(batch), generate.force_length(visit.model, output)
    generate.timed(visit.model, ids, config)
    whole = meter.tensor_peak(lambda: generate.timed(visit.model, ids, config))
    found = visit._tensors_beside_weights(Cell(batch, output))
    assert found == pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize("output", [2, 17])
def test_the_length_is_forced_whatever_the_model_wants_to_end(output):
    model = tiny.model("gqa")
    with torch.no_grad():  # every next token is the end token, if it counted
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1e3
    seen = []
    original = model.generate
    model.generate = lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
    ids = torch.ones(3, 5, dtype=torch.long)
    whole, first = generate.timed(model, ids, generate.force_length(model, output))
    assert seen[0].shape == (3, 5 + output)
    assert 0 < first < whole


def test_time_equals_time_by_hand():
    model = tiny.model("gqa")
    ids = torch.ones(2, 12, dtype=torch.long)
    config = generate.force_length(model, 24)
    generate.timed(model, ids, config)
    pairs = []
    for _ in range(7):
        began = time.perf_counter()
        whole, _ = generate.timed(model, ids, config)
        pairs.append(whole / (time.perf_counter() - began))
    assert 0.8 < statistics.median(pairs) <= 1.0


def test_prompt_is_the_papers_repeated_or_cut():
    tokenizer = tiny.tokenizer()
    text = tokenizer.encode(protocol.PROMPT)
    long = generate.prompt_ids(tokenizer, 320, len(text) + 3)
    assert long == text + text[:3]
    assert generate.prompt_ids(tokenizer, 320, 4) == text[:4]
    assert all(0 <= i < 50 for i in generate.prompt_ids(None, 50, 12))


def test_utilisation_is_sampled_while_it_runs():
    sampler = UtilisationSampler(torch.device("cpu"), every_s=0.05)
    sampler.start()
    deadline = time.perf_counter() + 30
    while len(sampler.samples) < 3 and time.perf_counter() < deadline:
        sum(range(1000))
    sampler.stop()
    count = len(sampler.samples)
    assert count >= 3
    assert all(0 <= s <= 100 for s in sampler.samples)
    assert max(sampler.samples) > 50 / os.cpu_count()  # one of them was busy
    time.sleep(0.15)
    assert len(sampler.samples) == count
