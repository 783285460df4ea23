"""Standard errors by bootstrap: lm-eval's own numbers, without its pool of processes."""

from __future__ import annotations

import multiprocessing
import random
import statistics

import pytest
from lm_eval.api import metrics

from core.errors import Cancelled
from core.evaluate import bootstrap


def values(size):
    draw = random.Random(3)
    return [draw.gauss(-2, 1) for _ in range(size)]


@pytest.mark.parametrize("name", ["perplexity", "mean", "median"])
@pytest.mark.parametrize("size", [7, 101])
def test_the_numbers_are_lm_evals(monkeypatch, name, size):
    function, xs = getattr(metrics, name), values(size)
    wanted = statistics.stdev(metrics._bootstrap_internal_no_mp(function, xs, 2000))
    monkeypatch.setattr(multiprocessing, "Pool", None)  # no other process
    with bootstrap.in_this_process():
        found = metrics.bootstrap_stderr(function, xs, 2000)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_pieces_do_not_matter(monkeypatch):
    xs = values(50)
    whole = bootstrap.means(xs, 3000)
    monkeypatch.setattr(bootstrap, "_DRAWS", 170)
    assert bootstrap.means(xs, 3000) == whole


def test_lm_evals_function_is_put_back_and_a_request_to_stop_is_heard():
    plain = metrics.bootstrap_stderr

    def stop():
        raise Cancelled("Stop.")

    for function in (metrics.perplexity, metrics.median):
        with pytest.raises(Cancelled), bootstrap.in_this_process(stop):
            metrics.stderr_for_metric(function, 1000)(values(9))
    assert metrics.bootstrap_stderr is plain
