"""Search against the naive way: sets really removed, costs by stock transformers, every subset."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest
import torch

from core.__main__ import main
from core.doctor import plain
from core.errors import OptionError
from core.importance import passes as counting
from core.importance.branches import losses_without, make_batch
from core.importance.greedy import greedy as sleb
from core.model import loading
from core.model.blocks import BlockView
from core.prune import plan, scores
from core.runs.progress import SILENT
from core.search import measure, methods, results
from core.search.ledger import NONE, Cost, Group, Ledger, Tape
from core.search.methods import Task

CPU = torch.device("cpu")
ALL = (0, 1, 2, 3, 4)


def rows_for(model, lengths=(24, 24, 9)):
    draw = torch.Generator().manual_seed(7)
    size = model.config.vocab_size
    return [torch.randint(0, size, (n,), generator=draw).tolist() for n in lengths]


@pytest.fixture(scope="module", params=["gqa", "mistral"])
def model(request, tiny_dir):
    return loading.load_model(tiny_dir(request.param), CPU, torch.float32)


def ledger_of(model, rows, objective="kl", most=4):
    view = BlockView(model)
    batch = make_batch(rows, view)
    return Ledger(measure.Meter(view, batch, SILENT), objective, len(view), most)


def test_costs_equal_stock_transformers_without_the_blocks(model):
    rows = rows_for(model)
    ledger = ledger_of(model, rows)  # four states at once: many groups
    terms = methods.predictor(ALL, ledger)
    labelled = [(row, row) for row in rows]
    assert len(ledger.costs) == 1 + 5 + 10
    for drop, cost in ledger.costs.items():
        smaller = plain.without(model, drop)
        assert cost.nll == pytest.approx(plain.mean_loss(smaller, labelled), rel=1e-5)
        assert cost.kl == pytest.approx(plain.divergence(model, smaller, rows), rel=1e-5)
    assert ledger.costs[NONE].kl == 0
    pair = ledger.costs[frozenset({1, 3})].kl
    alone = ledger.costs[frozenset({1})].kl + ledger.costs[frozenset({3})].kl
    assert terms.interaction[1, 3] == pytest.approx(pair - alone, rel=1e-9)
    assert terms.of({1, 3}) == pytest.approx(pair, rel=1e-9)
    assert ledger.plain_passes == sum(
        len(plain.without(model, drop).model.layers) for drop in ledger.costs
    )
    whole = ledger_of(model, rows, most=99)
    methods.predictor(ALL, whole)
    assert whole.passes == counting.shared(ALL, whole.costs)[0] < ledger.passes
    assert ledger.passes < ledger.plain_passes
    assert {s: c.kl for s, c in whole.costs.items()} == pytest.approx(
        {s: c.kl for s, c in ledger.costs.items()}, rel=1e-5
    )


def test_kl_in_pieces_of_vocabulary_and_rows(model, monkeypatch):
    rows = rows_for(model)
    view = BlockView(model)
    sets = [NONE, frozenset({2}), frozenset({0, 4})]
    usual = losses_without(view, make_batch(rows, view), sets, want_kl=True)
    monkeypatch.setattr("core.importance.forward.LOGITS_CPU", 1)  # pieces of 256 of 320
    monkeypatch.setattr("core.importance.branches.HEAD_TOKENS", 8)
    small = losses_without(view, make_batch(rows, view), sets, want_kl=True)
    assert small.kl == pytest.approx(usual.kl, rel=1e-5)
    assert small.nll == pytest.approx(usual.nll, rel=1e-6)
    with pytest.raises(ValueError, match="empty set"):
        losses_without(view, make_batch(rows, view), sets[1:], want_kl=True)


@pytest.mark.parametrize("objective", ["kl", "nll"])
def test_methods_against_every_subset(model, objective):
    rows = rows_for(model)
    ledger, task = ledger_of(model, rows, objective), Task(ALL, (1, 2, 3))
    found = {}
    for name, method in methods.METHODS.items():
        before = {count: ledger.cheapest(count, ALL) for count in task.counts}
        found[name] = {}
        method(task, ledger, lambda drop, name=name: found[name].update({len(drop): tuple(drop)}))
        value = {c: ledger.costs[frozenset(d)].by(objective) for c, d in found[name].items()}
        assert list(value) == [1, 2, 3]
        if name == "beam":
            for count, drop in found["greedy"].items():
                assert value[count] <= ledger.costs[frozenset(drop)].by(objective)
        if name == "evolve":
            for count, start in before.items():
                assert value[count] <= ledger.costs[start].by(objective)
    for count in task.counts:
        every = [frozenset(s) for s in itertools.combinations(ALL, count)]
        values = dict(zip(every, ledger.values(every), strict=True))
        assert values[frozenset(found["pairs"][count])] == min(values.values())
    if objective == "nll":
        view = BlockView(model)
        order = [r.block for r in sleb(view, make_batch(rows, view), rounds=3, kept=())]
        assert list(found["greedy"][3]) == order


def rough(seed, blocks=9):
    """A ledger of made-up costs with strong pair and triple terms."""
    draw = random.Random(seed)
    worth = {
        frozenset(s): draw.uniform(0, 1) if size == 1 else draw.uniform(-0.4, 0.8)
        for size in (1, 2, 3)
        for s in itertools.combinations(range(blocks), size)
    }

    def costs(drop):
        value = sum(v for part, v in worth.items() if part <= drop)
        return Cost(value, value)

    def measured(sets):
        passes = counting.shared(range(blocks), sets)[0]
        return Group(tuple(sets), tuple(map(costs, sets)), passes, 1.0)

    return Ledger(measured, "kl", blocks, 12)


def found_by(name, task, ledger):
    found = {}
    methods.METHODS[name](task, ledger, lambda drop: found.update({len(drop): frozenset(drop)}))
    return {count: ledger.costs[drop].kl for count, drop in found.items()}


def test_beam_never_loses_to_greedy_and_evolution_never_to_its_start():
    task, better = Task(tuple(range(9)), (1, 2, 3, 4, 5)), 0
    for seed in range(12):
        ledger = rough(seed)
        greedy, beam = found_by("greedy", task, rough(seed)), found_by("beam", task, ledger)
        assert all(beam[count] <= greedy[count] for count in task.counts)
        evolved = found_by("evolve", task, ledger)
        assert all(evolved[count] <= beam[count] for count in task.counts)
        better += sum(evolved[count] < greedy[count] for count in task.counts)
    assert better > 10  # the landscape is hard enough to tell the methods apart


def test_the_command_resumes_as_if_it_had_never_been_killed(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setattr("core.search.rehearsal.STATES_BYTES", 6 * 4 * 16 * 32 * 4)
    folder = tiny_dir("gqa")
    argv = ["search", str(folder), "--calibration", "english", "--samples", "4", "--length", "16"]
    argv += ["--methods", "one-shot,greedy,beam,pairs,evolve", "--counts", "1-3"]
    argv += ["--protect-first", "0", "--protect-last", "0", "--device", "cpu"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*argv, "--out", str(whole)]) == 0
    summary = results.Search.read(whole)
    assert summary.passes < summary.plain_passes
    assert summary.heldout
    rows = results.SetRow.read(whole)
    assert {(r.method, r.count) for r in rows} == {
        (m, c) for m in methods.METHODS for c in (1, 2, 3)
    }
    assert all(r.heldout_kl > 0 and r.kl > 0 and r.heldout_kl != r.kl for r in rows)
    pairs = results.PairRow.read(whole)
    assert len(pairs) == 10
    assert results.interactions(pairs, 5)[3][1] == results.interactions(pairs, 5)[1][3] is not None

    usual, calls = measure.Meter.__call__, []

    def stopping(self, sets):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(sets)
        return usual(self, sets)

    monkeypatch.setattr(measure.Meter, "__call__", stopping)
    assert main([*argv, "--out", str(killed)]) == 130
    assert not (killed / "sets.csv").exists()
    with (killed / "measured.jsonl").open("a") as tape:
        tape.write('{"sets": [[0')  # a line cut short
    monkeypatch.setattr(measure.Meter, "__call__", usual)
    assert main([*argv, "--out", str(killed), "--resume"]) == 0

    def lasting(folder):
        return [dataclasses.replace(r, seconds=0.0) for r in results.SetRow.read(folder)]

    assert lasting(killed) == lasting(whole)
    assert results.PairRow.read(killed) == pairs
    assert results.Search.read(killed).passes == summary.passes
    lines = [json.loads(line) for line in (killed / "measured.jsonl").read_text().splitlines()]
    assert [s["sets"] for s in lines[1:5]] == [[sorted(d) for d in sets] for sets in calls]
    argv[argv.index("--length") + 1] = "17"
    assert main([*argv, "--out", str(killed), "--resume"]) == 2

    found = scores.load(whole)
    assert found.available == (*methods.METHODS, "best")
    best = plan.choose(found, "best", count=2)
    cheapest = results.by_count(rows)[2]
    assert best.drop == cheapest.blocks
    assert cheapest.kl == min(r.kl for r in rows if r.count == 2)
    assert main(["plan", str(whole), "--criterion", "beam", "--ratio", "0.3"]) == 0
    assert main(["plan", str(whole), "--criterion", "beam", "--count", "4"]) == 2


def test_a_tape_of_other_settings_is_refused(tmp_path):
    path, healed = tmp_path / "tape", {"length": 16, "heal": "refit"}
    Tape(path, healed, 6, resume=False)
    assert Tape(path, healed, 9, resume=True).most == 6
    for other, name in (({"length": 16}, "heal"), ({**healed, "join": "rows"}, "join")):
        with pytest.raises(OptionError, match=f"measured with another {name}"):
            Tape(path, other, 6, resume=True)


def test_dry_run_counts_the_passes_and_bad_input_is_refused(tiny_dir, tmp_path, capsys):
    start = ["search", str(tiny_dir("gqa")), "--out", str(tmp_path / "x"), "--device", "cpu"]
    options = ["--methods", "one-shot,pairs", "--counts", "2", "--protect-first", "0"]
    assert main([*start, *options, "--protect-last", "0", "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    single = counting.shared(ALL, [NONE, *(frozenset({b}) for b in ALL)])[0]
    assert single < told["passes"]["one-shot"] <= single + 5 + 5  # one pair on top
    assert told["sets"] == 16
    assert told["total_passes"] < told["plain_passes"] == 5 + 5 * 4 + 10 * 3
    assert not (tmp_path / "x").exists()
    for bad, sentence in (
        (["--protect-first", "3", "--protect-last", "2"], "leaves none to remove"),
        (["--counts", "4"], "--counts: 4 is out of range. With the first 1 and last 1 of 5"),
        (["--methods", "luck"], "--methods: unknown value 'luck'"),
        (["--length", "999"], "exceed the model's context"),
        (["--heal", "refit", "--protect-first", "0"], "block 0 has none. Use --protect-first 1 or"),
        (["--heal", "refit", "--samples", "4", "--length", "16"], "at least 640 tokens"),
    ):
        assert main([*start, *bad, "--dry-run"]) == 2
        assert sentence in capsys.readouterr().err
