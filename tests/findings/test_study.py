"""Findings of a study: each is provoked once and stays silent once."""

from __future__ import annotations

import random

import pytest
import study_helpers as made

from core.benchmark.analytic import memory_bytes
from core.checkpoint import headers
from core.findings import of_study
from core.findings.cost import gain_below_noise, memory_too_large
from core.findings.quality import large_drop
from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import info_of, study


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A workspace with a dense checkpoint; returns a small maker of runs."""
    return Lab(tmp_path, monkeypatch)


class Lab:
    def __init__(self, tmp_path, monkeypatch):
        self.root = tmp_path / "ws"
        monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(self.root))
        self.dense = made.checkpoint(tmp_path / "dense")
        self.total = headers.inspect(self.dense).parameters
        self.clock = 0.0

    def when(self):
        self.clock += 1
        return self.clock

    def pruned(self, name, drop):
        folder = made.pruned(self.root, name, self.dense, drop, self.when(), self.total)
        return made.checkpoint(folder, 6 - len(drop))

    def judged(self, folder, ppl):
        at = self.when()
        run = made.run(self.root, f"evaluate-{at}", "evaluate", at, checkpoint=folder)
        row = ["text.txt", 64, "once", 1000, ppl]
        workspace.write_csv(
            run / "perplexity.csv", ("source", "window", "bos", "tokens", "ppl"), [row]
        )
        workspace.write_json(run / "summary.json", {"device": "cpu", "dtype": "float32"})

    def retrained(self, name, folder):
        run = made.run(
            self.root, name, "retrain", self.when(), checkpoint=folder, method="lora", data="x"
        )
        return made.checkpoint(run / "merged").parent

    def timed(self, latencies, name="bench", **more):
        """Write a benchmark from latencies: variant -> visit -> seconds."""
        import statistics

        rows, singles = [], []
        for variant, (_, visits) in latencies.items():
            times = [t for visit in visits for t in visit]
            rows.append({
                "variant": variant, "batch_size": 1, "input_tokens": 12, "output_tokens": 8,
                "latency_s_mean": statistics.fmean(times), "latency_s_std": statistics.stdev(times),
                "peak_memory_mib": 100.0, "oom": False, "runs": len(times),
            })  # fmt: skip
            singles += [
                [variant, 1, 12, 8, visit, n, t, t / 9]
                for visit, own in enumerate(visits)
                for n, t in enumerate(own)
            ]
        paths = {variant: str(path) for variant, (path, _) in latencies.items()}
        folder = made.benchmark(self.root, name, self.when(), paths, rows, **more)
        columns = ("variant", "batch_size", "input_tokens", "output_tokens", "visit", "run",
                   "latency_s", "first_token_s")  # fmt: skip
        if not more.get("no_runs"):
            workspace.write_csv(folder / "runs.csv", columns, singles)

    def study(self):
        return study(Workspace(), str(self.dense))


# -------------------------------------------------------------------------------------- large drop


def test_a_large_drop_is_said_with_what_may_help(lab):
    bad, good = lab.pruned("bad", [0, 2]), lab.pruned("good", [2, 3])
    for folder, ppl in ((lab.dense, 10.0), (bad, 40.0), (good, 11.0)):
        lab.judged(folder, ppl)
    found = large_drop(lab.study())
    assert "perplexity 40, 4.00 times that of the dense model (10)" in found.sentence
    assert "other variant" not in found.sentence
    assert "Block 0 is usually protected; protect more blocks." in found.try_next
    assert " instead: same size, perplexity 11." in found.try_next
    assert "Retrain it" in found.try_next
    assert found.evidence["measured by"] == "text.txt, windows of 64, BOS once"
    assert 4.0 in found.evidence.values()


def test_nothing_else_measured_means_comparing_criteria(lab):
    for folder, ppl in ((lab.dense, 10.0), (lab.pruned("bad", [2, 3]), 40.0)):
        lab.judged(folder, ppl)
    found = large_drop(lab.study())
    assert found.try_next.startswith("Compare criteria: the curve shows")
    assert "protect" not in found.try_next


@pytest.mark.parametrize(
    ("more", "ending"),
    [((30.0,), "One other variant did too."), ((30.0, 20.0), "2 other variants")],
)
def test_other_variants_beyond_the_limit_are_counted(lab, more, ending):
    lab.judged(lab.dense, 10.0)
    for at, ppl in enumerate((40.0, *more)):
        lab.judged(lab.pruned(f"cut{at}", [2, 3, 4][: at + 1]), ppl)
    assert ending in large_drop(lab.study()).sentence


@pytest.mark.parametrize("ppl", [14.9, None])
def test_a_small_drop_or_an_unknown_one_is_silent(lab, ppl):
    cut = lab.pruned("cut", [2, 3])
    lab.judged(lab.dense, 10.0)
    if ppl:
        lab.judged(cut, ppl)
    assert large_drop(lab.study()) is None


def test_without_the_dense_perplexity_there_is_nothing_to_say(lab):
    lab.judged(lab.pruned("cut", [2, 3]), 90.0)
    assert large_drop(lab.study()) is None


def test_what_retraining_recovered_is_not_held_against_its_parent(lab):
    cut = lab.pruned("cut", [2, 3])
    lab.judged(lab.dense, 10.0)
    lab.judged(cut, 40.0)
    tuned = lab.retrained("tuned", cut)
    lab.judged(tuned, 12.0)
    assert large_drop(lab.study()) is None
    again = lab.retrained("again", lab.pruned("worse", [1, 2, 3]))
    lab.judged(again, 30.0)
    found = large_drop(lab.study())
    assert "LoRA" in found.sentence
    assert "continued pretraining" in found.try_next


# ---------------------------------------------------------------------------------------- memory


def test_memory_is_measured_against_the_budget(lab):
    cut = lab.pruned("cut", [2])
    lab.timed({"dense": (lab.dense, [[1.0, 1.1]]), "cut": (cut, [[0.5, 0.6]])})
    found = memory_too_large(lab.study(), 60.0, "cuda:0", (1, 12, 8))
    assert "needs 100 MiB (measured) at batch 1 with 8 new tokens, and cuda:0 has 60.0 MiB" in (
        found.sentence
    )
    assert memory_too_large(lab.study(), 100.0, "cuda:0", (1, 12, 8)) is None


def test_memory_is_estimated_where_nothing_was_measured(lab):
    lab.pruned("cut", [2])
    known = lab.study()
    info = info_of(known.dense)
    heads, width, tokens = 4, 8, 12 + 128
    block = 4 * (info.block_parameters[0] + 2 * heads * width * tokens) / 2**20
    whole = memory_bytes(info, 1, 12, 128, "float32")["total"] / 2**20
    found = memory_too_large(known, whole - 1.5 * block)
    assert "Still too large: without 2" in found.sentence
    assert "(estimated)" in found.sentence
    assert found.try_next.startswith("Remove about 2 of the 6 blocks (estimated).")
    assert "bfloat16" in found.try_next
    assert memory_too_large(known, whole - 0.9 * block) is None


def test_a_budget_below_everything_but_the_blocks_is_said(lab):
    text = memory_too_large(lab.study(), 0.001).try_next
    assert text.startswith("Removing blocks alone is not enough.")


# ----------------------------------------------------------------------------------------- noise


def visits(middle, spread, seed, drift=0.0):
    rng = random.Random(seed)
    return [[rng.gauss(middle + d, spread) for _ in range(10)] for d in (-drift, drift)]


def test_a_gain_within_the_noise_is_said(lab):
    cut = lab.pruned("cut", [2])
    lab.timed({"dense": (lab.dense, visits(1.0, 0.05, 1)), "cut": (cut, visits(0.99, 0.05, 2))})
    known = lab.study()
    found = gain_below_noise(known, known.benchmarks[0])
    assert found.sentence.startswith("At batch 1 with 8 new tokens without 2")
    assert "not measurably faster" in found.sentence
    assert "--runs" in found.try_next


def test_rounds_that_drift_apart_count_as_noise(lab):
    cut = lab.pruned("cut", [2])
    steady = {"dense": (lab.dense, visits(1.0, 0.001, 1)), "cut": (cut, visits(0.9, 0.001, 2))}
    lab.timed(steady, "steady")
    drifting = dict(steady, cut=(cut, visits(0.9, 0.001, 2, drift=0.15)))
    lab.timed(drifting, "drifting")
    known = lab.study()
    by_name = {b.id: gain_below_noise(known, b) for b in known.benchmarks}
    assert by_name["steady"] is None
    assert by_name["drifting"].key == "noise"


def test_a_slower_variant_is_called_slower(lab):
    cut = lab.pruned("cut", [2])
    lab.timed({"dense": (lab.dense, visits(1.0, 0.001, 1)), "cut": (cut, visits(1.2, 0.001, 2))})
    known = lab.study()
    assert "slower than the dense model" in gain_below_noise(known, known.benchmarks[0]).sentence


def test_without_single_runs_mean_and_deviation_decide(lab):
    cut = lab.pruned("cut", [2])
    for name, spread in (("loud", 0.3), ("calm", 0.01)):
        latencies = {"dense": (lab.dense, visits(1.0, spread, 1)),
                     "cut": (cut, visits(0.9, spread, 4))}  # fmt: skip
        lab.timed(latencies, name, no_runs=True)
    known = lab.study()
    by_name = {b.id: gain_below_noise(known, b) for b in known.benchmarks}
    assert by_name["calm"] is None
    assert by_name["loud"].key == "noise"


def test_a_study_puts_its_findings_together_and_a_good_one_has_its_verdict(lab):
    cut = lab.pruned("cut", [2])
    lab.judged(lab.dense, 10.0)
    lab.judged(cut, 40.0)
    lab.timed({"dense": (lab.dense, visits(1.0, 0.05, 1)), "cut": (cut, visits(0.99, 0.05, 2))})
    known = lab.study()
    keys = [f.key for f in of_study(known, budget_mib=1.0, cell=(1, 12, 8))]
    assert keys == ["verdict", "large-drop", "memory", "noise"]
    assert [f.key for f in of_study(known)] == ["verdict", "large-drop", "noise"]
    lab.judged(cut, 10.5)
    lab.timed(
        {"dense": (lab.dense, visits(1.0, 0.01, 1)), "cut": (cut, visits(0.7, 0.01, 2))}, "b2"
    )
    (only,) = of_study(lab.study(), budget_mib=200.0, cell=(1, 12, 8))
    assert only.sentence.startswith("Take the model without 2 (11%)")
