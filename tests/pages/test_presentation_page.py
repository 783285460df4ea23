"""The Presentation page says in large figures what the files hold, and keeps the ratio."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from urllib.parse import parse_qsl

import pytest
import study_helpers as made
from streamlit.testing.v1 import AppTest

from core.charts import presentation as charts
from core.checkpoint import headers
from core.compare import headline
from core.compare.headline import Stop
from core.report.material import gather
from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A dense checkpoint in a workspace of its own."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    return tmp_path / "ws", made.checkpoint(tmp_path / "dense")


def judged(root, name, at, folder, ppl):
    run = made.run(root, name, "evaluate", at, checkpoint=folder)
    columns = ("source", "window", "bos", "tokens", "ppl")
    workspace.write_csv(run / "perplexity.csv", columns, [("text.txt", 64, "once", 999, ppl)])
    workspace.write_json(run / "summary.json", {"device": "cpu", "dtype": "float32"})


def measured(root, dense):
    total = headers.inspect(dense).parameters
    cuts = [made.pruned(root, f"cut{n}", dense, list(range(1, n + 1)), n, total) for n in (1, 2)]
    for count, cut in enumerate(cuts, 1):
        made.checkpoint(cut, 6 - count)
    for at, (folder, ppl) in enumerate([(dense, 10.0), (cuts[0], 12.0), (cuts[1], 25.0)]):
        judged(root, f"judge{at}", 10 + at, folder, ppl)
    names = {"dense": dense, "cut1": cuts[0]}
    rows = [
        {"variant": n, "batch_size": 1, "input_tokens": 12, "output_tokens": 8, "oom": False,
         "latency_s_mean": s, "latency_s_std": 0.001, "runs": 9, "peak_memory_mib": m}
        for n, s, m in (("dense", 1.0, 100.0), ("cut1", 0.8, 75.0))
    ]  # fmt: skip
    made.benchmark(root, "timed", 20, {n: str(p) for n, p in names.items()}, rows)
    return [f"{c.ratio:.1%}" for c in _ratios(cuts)]


def _ratios(cuts):
    from core.runs.workspace import Workspace
    from core.study.lineage import lineages

    found = {v.record.path: v for r in lineages(Workspace().runs()) for v in r.variants if v.record}
    return [found[c] for c in cuts]


def open_page(dense, **query):
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    page.query_params["model"] = str(dense)
    page.run().switch_page("pages/presentation.py")
    for name, value in {"model": str(dense), **query}.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception, page.exception
    return page


def tiles(page):
    return {m.label: m.value for m in page.metric}


def test_without_measurements_it_says_what_to_run(lab):
    page = open_page(lab[1])
    assert "nothing to present yet" in page.info[0].value
    assert "Make one and measure it" in [e.proto.label for e in page.get("page_link")]
    assert not page.code
    assert not page.select_slider


def test_big_figures_are_the_measured_ones_and_the_slider_is_the_only_control(lab):
    root, dense = lab
    small, large = measured(root, dense)
    page = open_page(dense, removed=small)
    shown = tiles(page)
    assert shown["Removed"] == f"{float(small[:-1]) / 100:.0%}"
    assert (shown["Speed"], shown["Memory"], shown["Perplexity"]) == ("1.25 x", "75%", "1.20 x")
    assert any("the dense speed, measured" in c.value for c in page.caption)
    widgets = [*page.button, *page.selectbox, *page.toggle, *page.text_input, *page.number_input]
    assert widgets == []
    (slider,) = page.select_slider
    slider.set_value(large).run()
    assert tiles(page)["Perplexity"] == "2.50 x"
    assert "Speed" not in tiles(page)  # nobody measured it, and nothing is known of the device
    assert any("of the dense model's, estimated" in c.value for c in page.caption)


@pytest.mark.parametrize("removed", ["99.9%", "nonsense"])
def test_a_ratio_that_is_not_there_falls_back(lab, removed):
    root, dense = lab
    ratios = measured(root, dense)
    assert open_page(dense, removed=removed).select_slider[0].value in ratios


def test_the_picture_holds_the_stops_and_hollow_is_estimated():
    stops = [
        Stop(
            "a",
            "a",
            0.1,
            (1,),
            9,
            1.1,
            1.2,
            0.9,
            "measured",
            retrained_ppl=1.05,
            retrained_by="LoRA",
        ),
        Stop("b", "b", 0.2, (1, 2), 8, 1.5, 1.4, 0.8, "estimated", is_plan=True),
        Stop("c", "c", 0.3, (1, 2, 3), 7, 2.5, None, None, "unknown", is_plan=True),
    ]
    figure = json.loads(charts.payoff(stops, stops[1]).to_json())
    by_name = {t["name"]: t for t in figure["data"]}
    assert by_name["perplexity"]["y"] == [1.0, 1.1, 1.5, 2.5]
    assert by_name["speed"]["y"] == [1.0, 1.2, 1.4]
    assert by_name["memory"]["x"] == [0.0, 0.1, 0.2]
    assert by_name["speed"]["marker"]["symbol"][1:] == ["triangle-up", "triangle-up-open"]
    assert "open" not in "".join(by_name["perplexity"]["marker"]["symbol"])
    assert by_name["perplexity after retraining"]["y"] == [1.05]
    assert len({t["line"]["dash"] for t in figure["data"] if t.get("line")}) == 3


def asked(root, name, at, folder, right):
    """Write an evaluate run's task: two questions, of which the second is answered as given."""
    run = made.run(root, name, "evaluate", at, checkpoint=folder)
    columns = ("task", "metric", "value", "stderr", "samples")
    workspace.write_csv(run / "tasks.csv", columns, [("arc_easy", "acc", (1 + right) / 2, 0.1, 2)])
    lines = [
        {"task": "arc_easy", "index": n, "content": str(n), "metrics": {"acc": float(is_right)},
         "target": 0, "question": f"Question {n}: what is wet?", "choices": ["water", "sand"],
         "loglikelihoods": [-1.0, -2.0], "answer": 0 if is_right else 1}
        for n, is_right in enumerate((True, right))
    ]  # fmt: skip
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    workspace.write_json(run / "summary.json", {"device": "cpu", "dtype": "float32"})


def shown(page):
    kinds = ("markdown", "caption", "info")
    return " ".join(e.value for kind in kinds for e in getattr(page, kind))


def test_it_shows_what_went_what_is_answered_and_what_it_was_before_retraining(lab):
    root, dense = lab
    small, _ = measured(root, dense)
    cut = root / "cut1"
    tuned = made.run(root, "tuned", "retrain", 30, checkpoint=cut, method="lora", data="x")
    made.checkpoint(tuned / "merged", 5)
    judged(root, "judge-tuned", 31, tuned, 11.0)
    asked(root, "tasks-dense", 32, dense, True)
    asked(root, "tasks-tuned", 33, tuned, False)
    page = open_page(dense, removed=small)
    text = shown(page)
    assert "Take the model without 1 (11%) + LoRA" in text
    assert "What was removed: 1 of 6 blocks." in text
    strip = json.loads(page.get("plotly_chart")[0].proto.spec)
    assert [d[2] for d in strip["data"][0]["customdata"]].count("dropped") == 1
    assert "Answers 1 of 2 science questions, 2 before." in text
    assert "**water** (right)" in text
    assert "**sand** (wrong; right is: water)" in text
    assert "Retraining brought the perplexity from 12 to 11; the dense model has 10." in text
    assert "Perplexity is the number of words that the model hesitates between" in text
    beside = page.table[0].value
    assert list(beside["what it is"]) == [
        "before pruning", "this variant", "before retraining",
    ]  # fmt: skip
    assert list(beside["perplexity"]) == ["10", "11 (1.10 x)", "12 (1.20 x)"]
    assert beside["speed"].tolist()[1] == "1.25 x, estimated"  # its original was measured


def test_if_pruning_does_not_pay_it_says_so_and_shows_the_best_option(lab):
    root, dense = lab
    measured(root, dense)
    worse = made.pruned(root, "more", dense, [1, 2, 3], 9, headers.inspect(dense).parameters)
    judged(root, "judge-more", 13, worse, 90.0)
    page = open_page(dense)
    assert "Take the model without 1 (11%)" in shown(page)  # the size with costs
    store.save(replace_ratio(dense, 0.3))
    page = open_page(dense)
    text = shown(page)
    assert "**Pruning does not pay here: the model without 1 to 3" in text
    assert "The best option is the model without 1 (11%)" in text
    assert tiles(page)["Removed"] == "11%"  # the option's figures


def replace_ratio(dense, ratio):
    """Return the study of ``dense`` with a target for the share to remove."""
    kept = store.of(str(dense), workspace.Workspace())
    settings = dataclasses.replace(kept.settings, ratio=ratio)
    return dataclasses.replace(kept, settings=settings, asked=True)


SETS = (
    "method", "objective", "heal", "count", "drop", "params", "ratio", "nll", "kl",
    "heldout_nll", "heldout_kl",
)  # fmt: skip


def searched(root, name, dense, at, rows, **more):
    """Write a search run; ``rows`` are (method, blocks, nll, kl, held-out nll, held-out kl)."""
    found = headers.inspect(dense)
    run = made.run(root, name, "search", at, checkpoint=dense)
    heal, cells = more.get("heal", "none"), []
    for method, drop, *costs in rows:
        left = found.parameters - 7744 * len(drop)  # as for a checkpoint that is made
        size = [len(drop), " ".join(map(str, drop)), left, 1 - left / found.parameters]
        cells.append([method, "kl", heal, *size, *costs])
    workspace.write_csv(run / "sets.csv", SETS, cells)
    summary = {
        "checkpoint_key": found.key, "blocks": found.blocks, "objective": "kl", "samples": 4,
        "length": 16, "seed": 1, "calibration": "text.txt", "dense_nll": math.log(10),
        "dense_heldout_nll": math.log(11), "sets_measured": 9, "device": "cpu", **more,
    }  # fmt: skip
    workspace.write_json(run / "summary.json", summary)
    return run


def test_the_best_set_of_searches_is_shown_and_says_how_it_was_chosen(lab):
    root, dense = lab
    rows = [("one-shot", (1, 2), math.log(30), 1.0, None, None),
            ("greedy", (2, 3), math.log(20), 0.7, math.log(21), 0.75)]  # fmt: skip
    searched(root, "found", dense, 5, rows)
    page = open_page(dense)
    assert tiles(page)["Perplexity"] == "2.00 x"
    text = shown(page)
    assert "How the set was chosen: greedy search, for the least KL from the dense model" in text
    assert (
        "9 sets were measured. It is a plan: a checkpoint of it has not been made yet, and" in text
    )
    assert "It has KL 0.75 and perplexity 21 (dense: 11), measured on held-out text" in text
    assert "A search found" not in text


def test_a_better_known_set_is_named_with_what_was_measured(lab):
    root, dense = lab
    total = headers.inspect(dense).parameters
    cut = made.pruned(root, "cut", dense, [1, 2], 2, total, criterion="one-shot",
                      plan={"scores": "found"})  # fmt: skip
    made.checkpoint(cut, 4)
    judged(root, "judge", 10, dense, 10.0)
    judged(root, "judge-cut", 11, cut, 25.0)
    own = ("one-shot", (1, 2), math.log(30), 1.0, math.log(33), 1.2)
    searched(root, "found", dense, 5, [own, ("greedy", (2, 3), 3.0, 0.7, math.log(22), 0.8)])
    page = open_page(dense)
    (link,) = [e.proto for e in page.get("page_link") if e.proto.label.startswith("Make it")]
    query = dict(parse_qsl(link.query_string))
    assert query == {"model": str(dense), "drop": "2,3", "criterion": "greedy"}
    pad = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    pad.switch_page("pages/prune.py")
    for key, value in query.items():
        pad.query_params[key] = value
    assert not pad.run().exception
    assert pad.session_state["prune_pad"].plans["A"].drop == (2, 3)
    text = shown(page)
    assert "How the set was chosen: cheapest single blocks" in text
    assert "set of this size with a lower KL (greedy search): without blocks 2, 3." in text
    assert "It has KL 0.8 and perplexity 22, the set shown here KL 1.2 and perplexity 33" in text
    assert "(dense: 11), measured on held-out text that chose nothing" in text
    searched(root, "healed", dense, 6, [("pairs", (3, 4), 2.7, 0.3, 2.8, 0.4)], heal="refit")
    text = shown(open_page(dense))
    assert (
        "another set of this size (search by pairs, healed by refit): without blocks 3, 4" in text
    )
    better = made.pruned(root, "better", dense, [3, 4], 7, total, criterion="pairs",
                         healing={"method": "refit"}, plan={"scores": "healed"})  # fmt: skip
    made.checkpoint(better, 4)
    judged(root, "judge-better", 12, better, 13.0)
    page = open_page(dense)
    assert tiles(page)["Perplexity"] == "1.30 x"
    text = shown(page)
    assert "How the set was chosen: search by pairs" in text
    assert "Its seams were healed by refit." in text
    assert "A search found" not in text
    (stop,) = headline.stops(gather(str(dense), Workspace(root)).scene)
    assert stop.ppl == pytest.approx(1.3)
    assert "More or fewer blocks removed" not in text  # one size makes no curve
