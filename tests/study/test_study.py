"""A study is gathered from run directories: variants, perplexities, tasks, benchmark points."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import study_helpers as made

from core import study as studies
from core.checkpoint import headers
from core.compare.candidates import candidates
from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import Protocol


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A workspace with one of everything: dense, two cuts, a cut of a cut, width, retrained."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    root, dense = tmp_path / "ws", made.checkpoint(tmp_path / "dense")
    total = headers.inspect(dense).parameters
    plan = {"protect_first": 1, "protect_last": 1, "blocks": 6, "protected": [0, 5]}
    made.pruned(root, "first", dense, [4, 2], 1, total, criterion="taylor", plan=plan)
    made.pruned(root, "again", "first", [0], 2, total, lineage=[{"dropped": [4, 2]}],
                original_blocks=[1, 3, 5])  # fmt: skip
    wide = made.checkpoint(made.run(root, "wide", "width", 3, checkpoint=dense, method="flap"))
    workspace.write_json(wide / "pruning.json", {"method": "flap", "parameters_after": total // 2,
                                               "layers": [0, 1, 2, 3, 4, 5]})  # fmt: skip
    tuned = made.run(root, "tuned", "retrain", 4, checkpoint=root / "first", method="lora",
                     data="demo")  # fmt: skip
    held = {"source": "demo", "rows": 20, "tokens": 300}
    ppl = {"heldout_ppl_dense": 2.0, "heldout_ppl_before": 4.0, "heldout_ppl_after": 3.0}
    workspace.write_json(tuned / "summary.json", {**ppl, "heldout": held})
    judged = made.run(root, "judged", "evaluate", 5, checkpoint="wide")
    columns = ("source", "window", "bos", "tokens", "ppl")
    workspace.write_csv(judged / "perplexity.csv", columns, [("demo", 128, "once", 999, 7.5)])
    columns = ("task", "metric", "value", "stderr", "samples")
    workspace.write_csv(judged / "tasks.csv", columns, [("piqa", "acc", 0.5, None, 40)])
    curve = made.run(root, "curve", "curve", 6, checkpoint=dense)
    rows = [("ppl", 0, 0.0, total, 2.0), ("ppl", 1, 0.1, total - 9, 2.5)]
    workspace.write_csv(curve / "curve.csv", ("criterion", "count", "ratio", "params", "ppl"), rows)
    text = {"calibration": "demo", "samples": 10, "length": 128, "seed": 1}
    summary = {"dense_ppl": 2.0, "drops": {"ppl 1": [3]}, "protected": [0], **text}
    workspace.write_json(curve / "summary.json", summary)
    return Workspace()


def test_variants_are_named_by_how_they_were_made(here, tmp_path):
    found = studies.study(here, "again")
    assert found == studies.study(here, str(tmp_path / "dense"))
    total = headers.inspect(tmp_path / "dense").parameters
    rows = [(v.id, v.label, v.kind, v.dropped, v.parent) for v in found.variants]
    dense = str(tmp_path / "dense")
    assert rows == [
        (dense, "dense", "dense", (), ""),
        ("first", f"Taylor+ {2 * 7744 / total:.0%}", "depth", (4, 2), dense),
        ("again", f"without 0, 2, 4 ({7744 / total:.0%})", "depth", (2, 4, 0), "first"),
        ("wide", "FLAP 50%", "width", (), dense),
        ("tuned", f"Taylor+ {2 * 7744 / total:.0%} + LoRA", "depth", (4, 2), "first"),
    ]
    assert found.dense.parameters == total
    assert [v.series for v in found.variants[2:]] == ["by hand", "FLAP", "Taylor+ + LoRA"]
    assert found.find("tuned").folder is None  # an adapter only
    assert found.find("first").ratio == pytest.approx(2 * 7744 / total)


def test_a_width_variant_is_named_by_what_differs_from_the_usual_way(here, tmp_path):
    dense = tmp_path / "dense"
    total = headers.inspect(dense).parameters
    for number, said in enumerate(("WIFN, UL-UM", "MLP only")):
        folder = made.checkpoint(made.run(here.root, f"w{number}", "width", 9, checkpoint=dense))
        record = {"method": "flap", "parameters_after": total // 2, "variant": said}
        workspace.write_json(folder / "pruning.json", record)
    found = {v.id: v for v in studies.study(here, str(dense)).variants}
    assert (found["w0"].label, found["w0"].series) == ("FLAP 50%, WIFN, UL-UM", "FLAP, WIFN, UL-UM")
    assert (found["w1"].label, found["w1"].series) == ("FLAP 50%, MLP only", "FLAP, MLP only")


def test_blocks_that_a_method_might_cut_go_by_their_dense_numbers(here, tmp_path):
    dense = tmp_path / "dense"
    again = {"dropped": [1], "dropped_original": [2], "original_blocks": [0, 3, 5]}
    plan = {"blocks": 4, "protected": [0, 3]}
    made.pruned(here.root, "second", "first", [1], 7, 99999, plan=plan, criterion="ppl",
                lineage=[{"dropped": [4, 1]}], **again)  # fmt: skip
    narrow = made.checkpoint(made.run(here.root, "narrow", "width", 8, checkpoint=dense))
    kept = {"method": "wanda-sp", "layers": [1, 2], "original_blocks": [0, 2, 3, 5]}
    workspace.write_json(narrow / "pruning.json", kept)
    found = {v.id: v.cut_in for v in studies.study(here, str(dense)).variants}
    assert found == {
        str(dense): (), "first": (1, 2, 3, 4), "again": (), "wide": (0, 1, 2, 3, 4, 5),
        "tuned": (1, 2, 3, 4), "second": (2, 3), "narrow": (2, 3),
    }  # fmt: skip
    (plan,) = studies.study(here, str(dense)).plans(Protocol("demo", 128, "rows",
                                                             "10 rows (seed 1)"))  # fmt: skip
    assert plan.cut_in == (1, 2, 3, 4, 5)


def test_perplexities_go_by_their_protocol(here, tmp_path):
    found = studies.study(here, "first")
    whole = Protocol("demo", 128, "once")
    assert found.perplexity("wide", whole).ppl == 7.5
    assert found.perplexity("first", whole) is None
    held = Protocol("demo", None, "held-out", "20 rows, 300 tokens")
    assert [found.perplexity(v, held).ppl for v in (str(tmp_path / "dense"), "first", "tuned")] == [
        2.0, 4.0, 3.0,
    ]  # fmt: skip
    rows = Protocol("demo", 128, "rows", "10 rows (seed 1)")
    assert [(q.criterion, q.drop, q.ppl) for q in found.plans(rows)] == [("ppl", (3,), 2.5)]
    assert found.perplexity(str(tmp_path / "dense"), rows).ppl == 2.0
    assert set(found.protocols) == {whole, held, rows}
    assert found.protocols[0] == held
    assert [(t.variant, t.task, t.value, t.samples) for t in found.tasks] == [
        ("wide", "piqa", 0.5, 40)
    ]


def importance(root, name, dense, started, ppl, **more):
    """Write an importance run of ppl and taylor; Taylor's order is that of the block numbers."""
    folder = made.run(root, name, "importance", started, checkpoint=dense)
    rows = [(block, value, float(block)) for block, value in enumerate(ppl)]
    workspace.write_csv(folder / "blocks.csv", ("block", "ppl", "taylor"), rows)
    text = {"calibration": "own.txt", "samples": 4, "length": 32, "seed": 7}
    workspace.write_json(folder / "summary.json", {"dense_ppl": 2.0, **text, **more})
    return folder


def test_perplexities_without_one_block_are_measured_plans(here, tmp_path):
    dense = tmp_path / "dense"
    folder = importance(here.root, "scored", dense, 7, [1.9, 9.0, 8.0, 2.5, 7.0, 1.8])
    info = headers.inspect(dense)
    rows = Protocol("own.txt", 32, "rows", "4 rows (seed 7)")
    found = studies.study(here, str(dense))
    plans = {q.criterion: q for q in found.plans(rows)}
    with (folder / "blocks.csv").open() as handle:
        measured = {int(r["block"]): float(r["ppl"]) for r in csv.DictReader(handle)}
    free = [1, 2, 3, 4]  # of six blocks the first and the last are protected
    cheapest = min(free, key=measured.__getitem__)
    assert {name: (q.drop, q.ppl) for name, q in plans.items()} == {
        "ppl": ((cheapest,), measured[cheapest]), "taylor": ((1,), measured[1]),
    }  # fmt: skip
    for plan in plans.values():
        left = info.parameters - info.block_parameters[plan.drop[0]]
        assert (plan.parameters, plan.ratio) == (left, pytest.approx(1 - left / info.parameters))
        assert (plan.cut_in, plan.protected, plan.run) == ((1, 2, 3, 4), True, "scored")
    shown = {c.id: c for c in candidates(found, rows)}
    assert shown["plan:ppl:3"].series == "PPL+"
    assert shown["plan:taylor:1"].ppl == 9.0
    assert shown[str(dense)].ppl == 2.0
    other = [c.id for c in candidates(found, Protocol("demo", 128, "rows", "10 rows (seed 1)"))]
    assert "plan:taylor:1" not in other
    workspace.write_csv(folder / "blocks.csv", ("block", "taylor"), [(b, 1.0) for b in range(6)])
    assert studies.study(here, str(dense)).plans(rows) == ()


def test_scores_of_a_checkpoint_that_was_replaced_are_left_out(tiny_dir, tmp_path):
    here, dense = Workspace(tmp_path / "ws"), tiny_dir("mha")
    key = headers.inspect(dense).key
    importance(here.root, "now", dense, 1, [5.0] * 5, checkpoint_key=key)
    importance(here.root, "before", dense, 2, [6.0] * 5, checkpoint_key="of other weights")
    found = studies.study(here, str(dense))
    assert {q.run for q in found.quality} == {"now"}
    assert {q.ppl for q in found.quality if q.drop} == {5.0}


def test_benchmark_points_find_their_variants(here, tmp_path):
    other = made.checkpoint(tmp_path / "elsewhere", words=5)
    rows = [
        {"variant": n, "batch_size": 1, "latency_s_mean": x, "oom": x is None}
        for n, x in (("a", 0.5), ("b", None), ("c", 0.25), ("d", 1.0))
    ]
    paths = {"a": "dense", "b": "ws/first", "c": str(other), "d": str(here.root / "gone")}
    folder = made.benchmark(here.root, "bench", 9, paths, rows)
    spec = workspace.read_json(folder / ".run" / "spec.json")
    workspace.write_json(folder / ".run" / "spec.json", {**spec, "cwd": str(tmp_path)})
    found = studies.study(here, str(tmp_path / "dense"))
    (bench,) = found.benchmarks
    dense = str(tmp_path / "dense")
    assert [(bench.variant_of(p), p.latency_s_mean, p.oom) for p in bench.points] == [
        (dense, 0.5, False), ("first", None, True), (str(other), 0.25, False), ("", 1.0, False),
    ]  # fmt: skip
    assert bench.missing == ("d",)
    assert found.variants[-1].kind == "other"
    said = studies.tokenizer_conflict(found.variants)
    assert said.startswith("dense and c have different tokenizers")
    assert studies.tokenizer_conflict(found.variants[:-1]) == ""


def test_steps_of_a_recipe_and_deleted_parents_are_found(here, tmp_path):
    dense = tmp_path / "dense"
    made.run(here.root, "recipe-1", "recipe", 10, checkpoint=dense)
    made.pruned(here.root, "recipe-1/cut", dense, [1], 11, 99999)
    found = studies.study(here, "recipe-1/cut")
    assert found.find("recipe-1/cut").dropped == (1,)
    shutil.rmtree(here.root / "first")
    again = studies.study(here, str(dense))
    assert again.find("first") is None
    assert again.find("recipe-1/cut")


def test_the_demo_without_runs_is_a_study_of_one(tmp_path):
    found = studies.study(Workspace(tmp_path), "demo")
    assert [v.label for v in found.variants] == ["demo"]
    assert found.dense.parameters == 2_222_464
    assert found.protocols == ()


def test_no_torch_is_imported():
    code = "import sys, core.study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("retrained", ["", "lora"])
@pytest.mark.parametrize("hollow", [False, True])
def test_plotly_knows_every_symbol_of_a_candidate(retrained, hollow):
    """Of every method and, by the names of their series, of those without a look of their own."""
    import plotly.graph_objects as go

    from core.charts.compare import LOOKS, SPARE, look_of
    from core.compare.candidates import Candidate

    named = [Candidate("k", "l", "depth", method, method) for method in LOOKS]
    spare = [Candidate("k", "l", "depth", "by hand", "x" * place) for place in range(20)]
    looks = [look_of(dataclasses.replace(c, retrained=retrained)) for c in (*named, *spare)]
    assert {look.colour for look in looks} >= {colour for colour, _ in SPARE}
    for look in looks:
        symbol = go.Scatter(marker={"symbol": look.marker(hollow=hollow)}).marker.symbol
        assert ("-open" in symbol) == hollow
        assert bool(retrained) == ("-dot" in symbol) or look.symbol in ("cross", "star")


def test_a_study_is_kept_until_something_of_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    root, dense = tmp_path / "ws", made.checkpoint(tmp_path / "dense")
    here, total = Workspace(root), headers.inspect(dense).parameters
    cut = made.pruned(root, "cut", dense, [1], 1, total)
    measured = made.run(root, "measured", "evaluate", 2, checkpoint="cut")
    columns = ("source", "window", "bos", "tokens", "ppl")

    def write(ppl):
        workspace.write_csv(measured / "perplexity.csv", columns, [("demo", 128, "once", 9, ppl)])

    def look():
        return studies.study(here, str(dense))

    def ppls(found):
        return [q.ppl for q in found.quality]

    write(3.0)
    first = look()
    assert ppls(first) == [3.0]
    assert look() is first
    write(4.25)
    second = look()
    assert ppls(second) == [4.25]
    here.rename(here.find("cut"), "shorter")
    assert [v.label for v in look().variants] == ["dense", "shorter"]
    made.run(root, "again", "evaluate", 3, checkpoint="cut")
    workspace.write_csv(root / "again" / "perplexity.csv", columns, [("x", 1, "once", 9, 5.0)])
    assert sorted(ppls(look())) == [4.25, 5.0]
    made.pruned(root, "more", cut, [0], 4, total)
    assert [v.id for v in look().variants] == [str(dense), "cut", "more"]
    third = look()
    assert look() is third
    made.checkpoint(dense, blocks=4)
    assert look().dense.blocks == 4
    (dense / "config.json").unlink()
    assert look().dense.folder is None


def test_a_redraw_with_many_runs_reads_no_file_of_a_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    root, dense = tmp_path / "ws", made.checkpoint(tmp_path / "dense")
    here, total = Workspace(root), headers.inspect(dense).parameters
    for place in range(20):
        made.pruned(root, f"cut{place}", dense, [place % 6], place + 1, total)
        folder = made.run(
            root, f"measured{place}", "evaluate", 100 + place, checkpoint=f"cut{place}"
        )
        row = ("demo", 128, "once", 9, 2.0 + place)
        columns = ("source", "window", "bos", "tokens", "ppl")
        workspace.write_csv(folder / "perplexity.csv", columns, [row])
    first = studies.study(here, str(dense))
    assert len(first.quality) == 20

    def read(self, *args, **kwargs):
        raise AssertionError(f"{self} is read again")

    monkeypatch.setattr(Path, "open", read)
    monkeypatch.setattr(Path, "read_text", read)
    assert studies.study(here, str(dense)) is first
