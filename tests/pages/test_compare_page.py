"""The Compare page: figures' data against points.csv, budgets, addresses, and what is said cold."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import study_helpers as made
from streamlit.testing.v1 import AppTest

from core.checkpoint import headers
from core.runs import workspace
from core.study import store
from core.ui import again

APP = str(Path(__file__).parents[2] / "app.py")
COLUMNS = (
    "variant", "batch_size", "input_tokens", "output_tokens", "latency_s_mean", "latency_s_p50",
    "latency_s_p10", "latency_s_p90", "latency_s_std", "first_token_s", "per_token_s",
    "tokens_per_s", "peak_memory_mib", "reserved_mib", "process_mib", "utilisation_pct", "oom",
    "runs", "estimated_latency_s", "estimated_memory_mib",
)  # fmt: skip
COST = {"dense": (10.0, 4000.0), "depth": (6.0, 3000.0), "width": (9.5, 3100.0)}
PPL = {"dense": 2.0, "depth": 2.3, "width": 2.2}


def points(names) -> list[dict]:
    """Return made-up measurements at batches 1 and 4; the dense model runs out at 4."""
    rows = []
    for name in names:
        for batch in (1, 4):
            row = dict.fromkeys(COLUMNS)
            pace, mib = COST[name]
            whole = pace * batch**0.5 * 8 / 1000
            row |= {"variant": name, "batch_size": batch, "input_tokens": 12, "output_tokens": 8}
            row |= {"oom": name == "dense" and batch == 4, "runs": 20, "estimated_memory_mib": mib}
            if not row["oom"]:
                row |= {"latency_s_mean": whole, "latency_s_p50": whole, "per_token_s": whole / 8}
                row |= {"latency_s_p10": 0.9 * whole, "latency_s_p90": 1.2 * whole}
                row |= {"latency_s_std": 0.01, "first_token_s": whole / 8, "peak_memory_mib": mib}
                row |= {"tokens_per_s": batch * 8 / whole, "estimated_latency_s": 0.9 * whole}
            rows.append(row)
    return rows


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A workspace with a depth and a width variant, judged and measured."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    root, dense = tmp_path / "ws", made.checkpoint(tmp_path / "dense")
    total = headers.inspect(dense).parameters
    made.pruned(root, "depth", dense, [2, 3], 1, total, criterion="ppl",
                plan={"protect_first": 1, "blocks": 6, "protected": [0]})  # fmt: skip
    wide = made.checkpoint(made.run(root, "width", "width", 2, checkpoint=dense, method="flap"))
    left = {"method": "flap", "parameters_after": total - 2 * 7744, "layers": [0, 1, 2, 3, 4, 5]}
    workspace.write_json(wide / "pruning.json", left)
    paths = {"dense": str(dense), "depth": str(root / "depth"), "width": str(wide)}
    for place, (name, path) in enumerate(paths.items()):
        judged = made.run(root, f"judged-{name}", "evaluate", 3 + place, checkpoint=path)
        columns = ("source", "window", "bos", "tokens", "ppl")
        row = ("demo", 128, "once", 9, PPL[name])
        workspace.write_csv(judged / "perplexity.csv", columns, [row])
    made.benchmark(root, "bench", 9, paths, points(paths), device_name="a processor", seed=1,
                   input_tokens=12)  # fmt: skip
    return tmp_path


def open_page(folder, **query) -> AppTest:
    page = AppTest.from_file(APP, default_timeout=90).switch_page("pages/compare.py")
    for name, value in {"model": str(folder), **query}.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception, page.exception
    return page


def widget(found, start):
    return next(w for w in found if w.label.startswith(start))


def figures(page) -> dict[str, dict]:
    """Return the page's charts by the title of their y axis."""
    specs = [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]
    return {s["layout"]["yaxis"].get("title", {}).get("text", ""): s for s in specs}


def numbers(values) -> list:
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
    return values


def said(page) -> str:
    kinds = ("markdown", "caption", "warning", "info", "error", "success")
    return " ".join(e.value for kind in kinds for e in getattr(page, kind))


def test_a_redraw_reads_no_headers_that_have_not_changed(prepared, header_reads):
    page = open_page(prepared / "dense")
    folders = {str(prepared / "dense"), *(str(prepared / "ws" / n) for n in ("depth", "width"))}
    assert header_reads == dict.fromkeys(folders, 1)
    header_reads.clear()
    assert not page.run().exception
    assert not header_reads
    changed = prepared / "ws" / "depth"
    made.checkpoint(changed, words=4)
    assert not page.run().exception
    assert header_reads == {str(changed): 1}


def test_panels_show_what_points_csv_holds(prepared):
    page = open_page(prepared / "dense")
    with (prepared / "ws" / "bench" / "points.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    drawn = figures(page)
    for title, column in (
        ("latency (s)", "latency_s_p50"),
        ("tokens/s", "tokens_per_s"),
        ("peak memory (MiB)", "peak_memory_mib"),
    ):
        traces = [t for t in drawn[title]["data"] if t.get("mode") == "lines+markers"]
        assert len(traces) == 3
        for trace in traces:
            key = trace["customdata"][0][0].split("/")[-1]
            mine = [r for r in rows if r["variant"] == key and r["oom"] == "false"]
            assert numbers(trace["y"]) == pytest.approx([float(r[column]) for r in mine])
            assert numbers(trace["x"]) == [int(r["batch_size"]) for r in mine]
    crosses = [t for t in drawn["latency (s)"]["data"] if "out of memory" in t["name"]]
    assert [numbers(t["x"]) for t in crosses] == [[4]]
    assert "4,000 MiB" in crosses[0]["hovertemplate"]
    ups = [t for t in drawn["speed-up over dense"]["data"] if t["customdata"][0][0] == "depth"]
    assert numbers(ups[0]["y"]) == pytest.approx([10 / 6])


def test_quality_and_pareto_hold_each_measured_perplexity(prepared):
    page = open_page(prepared / "dense")
    drawn = [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]
    pareto, quality = drawn[0], drawn[2]  # between them: the variant to take
    ends = {t["name"]: numbers(t["y"])[-1] for t in quality["data"]}
    assert ends["PPL+"] == PPL["depth"]
    assert ends["FLAP"] == PPL["width"]
    placed = {
        t["customdata"][0][0].split("/")[-1]: (numbers(t["x"])[0], numbers(t["y"])[0])
        for t in pareto["data"]
        if t.get("customdata")
    }
    assert placed == {name: (COST[name][1], PPL[name]) for name in PPL}
    front = next(t for t in pareto["data"] if t["name"] == "frontier")
    assert numbers(front["x"]) == [3000.0, 3100.0, 4000.0]


def test_every_panel_moves_with_the_ratio(prepared):
    root, dense = prepared / "ws", prepared / "dense"
    total = headers.inspect(dense).parameters
    made.pruned(root, "light", dense, [3], 10, total, criterion="ppl",
                plan={"protect_first": 1, "blocks": 6, "protected": [0]})  # fmt: skip
    row = points(["depth"])[0] | {"variant": "light", "peak_memory_mib": 3500.0}
    made.benchmark(root, "more", 11, {"light": str(root / "light")}, [row], input_tokens=12,
                   device_name="a processor", seed=1)  # fmt: skip
    page = open_page(dense)
    widget(page.multiselect, "Benchmark runs").set_value(["bench", "more"]).run()

    def drawn():
        panels = (figures(page)[title] for title in ("latency (s)", "peak memory (MiB)"))
        return [{t["customdata"][0][0] for t in p["data"] if t.get("mode") == "lines+markers"}
                for p in panels]  # fmt: skip

    slider = widget(page.select_slider, "Parameters removed")
    for word, kept in (("10.6%", "light"), ("21.2%", "depth")):
        slider.set_value(word).run()
        assert drawn() == [{str(dense), kept, "width"}] * 2


def test_the_page_says_in_which_blocks_each_method_might_cut(prepared):
    page = open_page(prepared / "dense")
    assert "Allowed to cut: PPL+ in blocks 1 to 5; FLAP in 0 to 5." in said(page)
    table = next(t.value for t in page.dataframe if "cut in blocks" in t.value)
    assert list(table["cut in blocks"]) == ["", "1 to 5", "0 to 5"]


def test_the_recipe_can_give_all_methods_the_same_blocks(prepared):
    page = open_page(prepared / "dense")
    widget(page.toggle, "Restrict all methods").set_value(True).run()
    assert any("--same-layers" in c.value for c in page.code)


def test_a_budget_picks_another_and_the_address_keeps_it(prepared):
    page = open_page(prepared / "dense")
    assert "Take FLAP 21%, the best of 2 variants" in said(page)
    widget(page.number_input, "Max ms per token").set_value(9.6).run()
    assert "Take FLAP 21%, the best of 2 variants within the targets" in said(page)
    widget(page.number_input, "Max ms per token").set_value(7.0).run()
    facts = "21% of the parameters removed; perplexity 2.3 on demo, 1.15 times dense"
    assert f"Take PPL+ 21%, the only variant within the targets: {facts}" in said(page)
    widget(page.number_input, "Max perplexity").set_value(1.05).run()
    assert "as none is within the targets" in said(page)
    again = open_page(prepared / "dense", ms="7.0")
    assert "Take PPL+ 21%" in said(again)
    chosen = open_page(prepared / "dense", point="depth")
    strip = [json.loads(c.proto.spec) for c in chosen.get("plotly_chart")][1]
    assert [d[2] for d in strip["data"][0]["customdata"]].count("dropped") == 2


def test_published_figures_are_drawn_over_their_own_dense_only(prepared):
    page = open_page(prepared / "dense", published="FLAP's README")
    quality = json.loads(page.get("plotly_chart")[2].proto.spec)
    stars = next(t for t in quality["data"] if t["name"].startswith("published"))
    assert pytest.approx(14.62 / 12.62) in numbers(stars["y"])
    own = next(t for t in quality["data"] if t["name"] == "FLAP")
    assert numbers(own["y"])[-1] == pytest.approx(PPL["width"] / PPL["dense"])
    assert "Stars: published" in said(page)
    page = open_page(prepared / "dense", published="SLEB's README", against="ratio")
    drawn = figures(page)
    stars = [t for t in drawn["speed-up over dense"]["data"] if "published" in t["name"]]
    assert numbers(stars[0]["y"]) == [1.05, 1.05, 1.27]
    assert not any("published" in t["name"] for t in drawn["latency (s)"]["data"])


def test_a_variant_deleted_meanwhile_and_other_tokenizers_are_a_sentence_each(prepared):
    shutil.rmtree(prepared / "ws" / "depth")
    (prepared / "ws" / "width" / "tokenizer.json").unlink()
    made.checkpoint(prepared / "ws" / "width", words=9)
    page = open_page(prepared / "dense", point="depth")
    warned = [w.value for w in page.warning]
    assert any(
        w.startswith("depth: measured in bench, but the checkpoint has since been del")
        for w in warned
    )
    assert any(
        "have different tokenizers, so their perplexities are not comparable" in w for w in warned
    )
    assert any(w.startswith("depth is no longer among these candidates") for w in warned)


def test_with_nothing_measured_the_page_offers_to_measure(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    page = open_page("demo")
    commands = [c.value for c in page.code]
    assert any(c.startswith("python -m core recipe depth-vs-width --out DIR") for c in commands)
    assert any("core benchmark demo --out DIR" in c for c in commands)
    widget(page.text_input, "Batch sizes").set_value("4-1").run()
    assert any("is reversed" in e.value for e in page.error)
    widget(page.text_input, "Batch sizes").set_value("2").run()
    widget(page.text_input, "Output tokens").set_value("100000").run()
    assert any("exceed the context of demo" in e.value for e in page.error)


def test_settings_of_an_earlier_benchmark_fill_the_form(prepared):
    page = AppTest.from_file(APP, default_timeout=90).switch_page("pages/compare.py")
    page.query_params["model"] = str(prepared / "dense")
    spec = {"checkpoints": [str(prepared / "ws" / "width")], "batch_sizes": [2, 8]}
    spec |= {"output_tokens": [32], "time_limit_s": 7, "device": "cpu"}
    record = made.run(prepared / "ws", "earlier", "benchmark", 20, **spec)
    values = again._values(workspace.read_run(record), str(prepared / "dense"))
    kept = store.of(str(prepared / "dense"), workspace.Workspace())
    store.save(kept.with_change("benchmark", values))
    page.run()
    assert not page.exception, page.exception
    assert widget(page.multiselect, "Variants").value == ["width"]
    assert widget(page.text_input, "Batch sizes").value == "2,8"
    assert widget(page.number_input, "Time limit").value == 7


def test_a_benchmark_that_has_finished_is_selected(prepared):
    bench, elsewhere = prepared / "ws" / "bench", prepared / "bench"
    bench.rename(elsewhere)
    page = open_page(prepared / "dense")
    assert widget(page.multiselect, "Benchmark runs").value == []
    elsewhere.rename(bench)
    page.run()
    assert widget(page.multiselect, "Benchmark runs").value == ["bench"]
    assert not any("nothing was measured" in c.value for c in page.caption)


def test_an_evaluation_that_has_finished_is_selected(prepared):
    page = open_page(prepared / "dense")
    usual = widget(page.selectbox, "Perplexity protocol").value
    assert usual == "demo, windows of 128, BOS once"
    later = made.run(prepared / "ws", "later", "evaluate", 30, checkpoint=prepared / "dense")
    columns = ("source", "window", "bos", "tokens", "ppl")
    workspace.write_csv(later / "perplexity.csv", columns, [("other.txt", 64, "once", 9, 3.0)])
    page.run()
    assert not page.exception, page.exception
    found = widget(page.selectbox, "Perplexity protocol").value
    assert found == "other.txt, windows of 64, BOS once"
    widget(page.selectbox, "Perplexity protocol").set_value(usual).run()
    assert widget(page.selectbox, "Perplexity protocol").value == usual  # until the next one


def test_an_estimated_cost_is_marked_wherever_it_is_written(prepared):
    made.pruned(prepared / "ws", "light", prepared / "dense", [4], 12,
                headers.inspect(prepared / "dense").parameters)  # fmt: skip
    page = open_page(prepared / "dense")
    widget(page.toggle, "Include estimates").set_value(True).run()
    measured, guessed = (t.value for t in page.dataframe if "cost" in t.value)
    assert set(measured["cost"]) == {"measured"}
    assert set(guessed["cost"]) == {"estimated"}
    assert "peak memory (MiB), estimated" in guessed
    assert "memory_mib" not in guessed
    pareto = json.loads(page.get("plotly_chart")[0].proto.spec)
    front = next(t for t in pareto["data"] if t["name"] == "frontier")
    assert numbers(front["x"]) == [3000.0, 3100.0, 4000.0]  # without the estimate
