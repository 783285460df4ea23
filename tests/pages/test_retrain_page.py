"""The Retrain page: settings and outlook, one launch, cancel and resume, results, side by side."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.recipes import sweep
from core.runs import jobs
from core.runs.workspace import read_run, write_csv, write_json
from core.study import store

APP = str(Path(__file__).parents[2] / "app.py")


@pytest.fixture
def pruned(here, tiny_gqa):
    """A run that cut a tiny checkpoint."""
    out = here.root / "cut"
    assert main(["prune", str(tiny_gqa), "--drop", "1,3", "--out", str(out)]) == 0
    return out


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(tiny.text(200, seed=11))
    return str(path)


def open_page(**query) -> AppTest:
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/retrain.py")
    for name, value in query.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception, page.exception
    return page


def widget(found, start):
    return next(w for w in found if w.label.startswith(start))


def wait(page, true, seconds=90):
    """Run the page until ``true(page)``."""
    deadline = time.monotonic() + seconds
    while not true(page):
        assert time.monotonic() < deadline
        time.sleep(0.3)
        page.run()
        assert not page.exception, page.exception


def finished(here, name, pruned, method="lora", recovered=0.5, data="a.jsonl", began=1.0):
    """A retraining as a finished run leaves it."""
    folder = here.root / name
    spec = {"checkpoint": str(pruned), "method": method, "data": data, "seed": 1, "out": "x"}
    write_json(folder / ".run" / "spec.json", {"command": "retrain", "spec": spec, "argv": ["x"]})
    write_json(
        folder / ".run" / "status.json", {"state": "done", "created": began, "finished": 9.0}
    )
    after = 2.0 - recovered
    write_json(
        folder / "summary.json",
        {
            "state": "done", "checkpoint": str(pruned), "heldout_loss_dense": 1.0,
            "heldout_loss_before": 2.0, "heldout_loss_after": after, "recovered": recovered,
            "gap_nat": 1.0, "steps": 4, "tokens": 1234, "trainable_parameters": 10,
            "tokens_per_s": 99.0, "peak_memory_mib": 7.0, "device": "cpu",
            "compute_dtype": "float32", "seed": 1, "settings": {"lr": 0.25},
            "data": {"source": data, "kind": "text"},
            "heldout": {"source": data, "rows": 3, "tokens": 30}, "merged": None,
        },
    )  # fmt: skip
    lines = [{"step": s, "loss": 3.0 - s / 4, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 5.0,
              "memory_mib": 7.0, "tokens": 9} for s in (1, 2, 3, 4)]  # fmt: skip
    lines += [{"event": "eval", "step": 4, "heldout_loss": after, "heldout_loss_dense": 1.0,
               "heldout_loss_before": 2.0, "recovered": recovered},
              {"event": "finding", "step": 4, "kind": "flat", "message": "Flat. Try a larger."}
             ]  # fmt: skip
    (folder / ".run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def figure(page, number=0):
    return json.loads(page.get("plotly_chart")[number].proto.spec)


@pytest.mark.usefixtures("prepared_runs")
def test_from_settings_to_a_finished_run_with_cancel_and_resume(here, pruned, texts):
    page = open_page(model="cut")
    assert widget(page.selectbox, "Variant").value == "cut"
    widget(page.text_input, "Data").set_value(texts).run()
    widget(page.number_input, "Steps").set_value(4000).run()
    widget(page.number_input, "Cutoff").set_value(64).run()
    (line,) = [c.value for c in page.code if "core retrain" in c.value]
    asked = (
        f"python -m core retrain cut --data {texts} --out DIR --cutoff 64 --steps 4000 --loss kl "
        "--merge"
    )
    assert line == asked
    wait(page, lambda p: any(m.label == "Trainable" for m in p.metric))
    labels = {m.label: m.value for m in page.metric}
    assert labels["Steps"] == "4,000 x 16"
    assert any("Hand-written layers." in c.value for c in page.caption)

    widget(page.button, "Start retraining").click().run()
    widget(page.button, "Start retraining")._value = True  # a browser's fast second click
    page.run()
    (record,) = here.runs("retrain")
    assert page.query_params["run"] in (record.id, [record.id])
    wait(page, lambda p: len(read_run(record.path).metrics()) > 3)
    page.run()
    assert any(m.label == "Held-out loss" for m in page.metric)
    names = [trace.get("name", "") for trace in figure(page)["data"]]
    assert "training loss" in names
    assert "held-out loss" in names
    widget(page.button, "Cancel").click().run()
    wait(page, lambda p: read_run(record.path).state == "cancelled")
    assert (record.path / "adapter" / "adapter_model.safetensors").is_file()

    page.run()
    widget(page.button, "Resume").click().run()
    wait(page, lambda p: read_run(record.path).state == "running")
    assert read_run(record.path).spec["resume"] is True
    jobs.cancel(read_run(record.path))
    assert read_run(record.path).state == "cancelled"


def test_a_finished_run_by_its_address(here, pruned, tiny_gqa):
    finished(here, "one", pruned, recovered=0.5)
    finished(here, "two", pruned, method="full", recovered=0.75, began=2.0)
    columns, row = ("source", "measure", "after"), ("x", "kl", 0.5)
    write_csv(here.root / "one" / "evaluation.csv", columns, [row])
    write_csv(here.root / "two" / "judged.csv", columns, [row])  # the name it had before
    page = open_page(run="one")
    text = " ".join(m.value for m in page.markdown)
    assert "50% of the gap was recovered" in text
    assert "from 2.0000 to 1.5000" in text
    assert any("3 held-out rows of a.jsonl (30 predicted" in c.value for c in page.caption)
    assert any("Flat. Try a larger." in w.value for w in page.warning)
    assert any("measure" in d.value.columns for d in page.dataframe)
    drawn = figure(page)["data"]
    assert drawn[0]["name"] == "training loss"
    assert {m.label: m.value for m in page.metric}["Recovered"] == "50%"
    # Both stand side by side, with what the files say.
    (table,) = [d.value for d in page.dataframe if "recovered" in d.value.columns]
    source = f"{tiny_gqa.name} without 1, 3 (26%) on a"
    assert table["name"].tolist() == [f"LoRA of {source}", f"Full fine-tuning of {source}"]
    assert table["recovered"].tolist() == [0.5, 0.75]
    assert table["lr"].tolist() == [0.25, 0.25]
    assert page.query_params["model"] in (str(pruned), [str(pruned)])
    widget(page.selectbox, "Run").set_value("two").run()
    assert page.query_params["run"] in ("two", ["two"])
    assert {m.label: m.value for m in page.metric}["Recovered"] == "75%"
    assert any("measure" in d.value.columns for d in page.dataframe)


def test_the_active_variant_is_chosen_also_by_its_path(here, pruned, tiny_gqa):
    assert main(["prune", str(tiny_gqa), "--drop", "2", "--out", str(here.root / "newer")]) == 0
    for name in ("cut", str(pruned)):
        assert widget(open_page(model=name).selectbox, "Variant").value == "cut"


def test_settings_are_used_again(here, pruned, texts):
    spec = {"checkpoint": "cut", "method": "full", "data": texts, "steps": 7, "lr": 0.5,
            "targets": ["q_proj"], "out": "x", "distil": True, "fused": "off"}  # fmt: skip
    page = AppTest.from_file(APP, default_timeout=60)
    page.query_params["model"] = "cut"
    store.save(store.of("cut", here).with_change("retrain", spec))  # as the Jobs page leaves it
    page.run().switch_page("pages/retrain.py").run()
    assert not page.exception, page.exception
    assert widget(page.selectbox, "Method").value == "full"
    assert widget(page.number_input, "Steps").value == 7
    assert widget(page.number_input, "Learning rate").value == 0.5
    (line,) = [c.value for c in page.code if "core retrain" in c.value]
    for part in (
        "cut",
        "--method full",
        "--steps 7",
        "--lr 0.5",
        "--distil",
        "--fused off",
        f"--data {texts}",
    ):
        assert part in line


def test_what_cannot_be_started_says_why(here, pruned, tmp_path):
    page = open_page(model="cut")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": ""}\n')
    widget(page.text_input, "Data").set_value(str(bad)).run()
    wait(page, lambda p: any("row 1 has an empty response" in e.value for e in p.error))
    assert widget(page.button, "Start retraining").disabled
    widget(page.number_input, "Steps").set_value(3).run()
    widget(page.number_input, "Epochs").set_value(1.0).run()
    assert any("Both 'Steps' and 'Epochs'" in e.value for e in page.error)
    assert here.runs("retrain") == []


def test_the_loss_follows_the_method_and_the_teacher_until_it_is_chosen(here, pruned, texts):
    def asked(page):
        (line,) = [c.value for c in page.code if "core retrain" in c.value]
        return line

    page = open_page(model="cut")
    widget(page.text_input, "Data").set_value(texts).run()
    loss = lambda: widget(page.selectbox, "Loss")  # noqa: E731
    assert loss().value == "kl"
    assert "--loss kl" in asked(page)
    assert any("docs/results/recovering.md" in c.value for c in page.caption)
    widget(page.selectbox, "Method").set_value("full").run()
    assert loss().value == "ce"
    widget(page.selectbox, "Method").set_value("lora").run()
    assert loss().value == "kl"
    widget(page.button, "Use the paper's settings").click().run()
    assert loss().value == "ce"
    assert "--loss" not in asked(page)
    assert "--lr 0.0001" in asked(page)
    assert "--batch 64" in asked(page)


def test_without_the_dense_model_the_loss_is_cross_entropy(here, pruned):
    record = json.loads((pruned / "pruning.json").read_text())
    write_json(pruned / "pruning.json", record | {"source": "gone", "base_model": "gone"})
    assert widget(open_page(model="cut").selectbox, "Loss").value == "ce"


def test_without_a_variant_the_page_says_where_to_get_one(here, tiny_gqa):
    page = open_page(model=str(tiny_gqa))
    assert any("No pruned variant yet" in i.value for i in page.info)


@pytest.mark.parametrize("column", ["evaluated_on", "judged_on"])  # the latter: earlier versions
def test_a_recipes_table_and_chart(here, pruned, column):
    folder = here.root / "recipe-1"
    spec = {"name": "ablation", "checkpoint": "demo", "out": "x"}
    write_json(folder / ".run" / "spec.json", {"command": "recipe", "spec": spec, "argv": ["x"]})
    write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0, "finished": 2.0})
    write_json(folder / "summary.json", {"verdict": "LoRA won.", "findings": ["By a lot."]})
    write_csv(
        folder / "table.csv",
        ("variant", column, "measure", "value", "spread", "items"),
        [("lora", "held out", "recovered", 0.5, None, 9), ("full", "held out", "kl", 2.0, None, 9)],
    )
    page = open_page(model="cut")
    widget(page.selectbox, "Recipe").set_value("ablation").run()
    assert any("LoRA won." in m.value for m in page.markdown)
    chart = figure(page, -1)
    assert [trace["name"] for trace in chart["data"]] == ["lora"]
    tables = [d.value for d in page.dataframe if "evaluated_on" in d.value.columns]
    assert isinstance(tables[0], pd.DataFrame)
    assert len(tables[0]) == 2


def test_a_sweeps_grid_is_checked_and_its_result_is_drawn(here, pruned):
    folder = here.root / "recipe-2"
    spec = {"name": "sweep", "checkpoint": "cut", "out": "x"}
    write_json(folder / ".run" / "spec.json", {"command": "recipe", "spec": spec, "argv": ["x"]})
    write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0, "finished": 2.0})
    write_json(
        folder / "summary.json", {"verdict": "Best of 2 trainings: lr-0.003.", "findings": ["KL."]}
    )
    columns = ("lr", "loss", *sweep.MEASURES)
    rows = [
        (0.001, "ce", 0.4, 0.1, 1.5, 9.0, 800, 90.0),
        (0.003, "kl", 0.3, 0.2, 1.6, 10.0, 800, 95.0),
    ]
    write_csv(folder / sweep.TABLE, columns, rows)
    page = open_page(model="cut")
    widget(page.selectbox, "Recipe").set_value("sweep").run()
    assert any("Best of 2 trainings" in m.value for m in page.markdown)
    assert any(c.value == "KL." for c in page.caption)
    (drawn,) = figure(page, -1)["data"]
    assert drawn["type"] == "parcoords"
    shown = {one["label"]: one for one in drawn["dimensions"]}
    assert list(shown) == ["lr", "loss", "seconds", "recovered", "recovered kl"]
    assert shown["loss"]["ticktext"] == ["ce", "kl"]
    table = next(d.value for d in page.dataframe if "recovered_kl" in d.value.columns)
    assert table["recovered_kl"].tolist() == [0.1, 0.2]
    widget(page.text_input, "Grid").set_value("speed=1,2").run()
    assert any("'speed=1,2' is not an option of retrain" in e.value for e in page.error)
    assert not any(b.label == "Run the recipe" for b in page.button)
    widget(page.text_input, "Grid").set_value("lr=1e-3,3e-3 loss=ce,kl").run()
    assert not page.error
    assert any(
        "recipe sweep cut" in c.value and "--grid lr=1e-3,3e-3" in c.value for c in page.code
    )
    assert any(b.label == "Run the recipe" for b in page.button)


def test_learning_rates_are_tested_and_one_is_taken(here, pruned):
    folder = finished(here, "rates", pruned)
    spec = json.loads((folder / ".run" / "spec.json").read_text())
    spec["spec"]["lr_range_test"] = True
    write_json(folder / ".run" / "spec.json", spec)
    columns = ("rate", "heldout_loss", "heldout_kl", "recovered", "recovered_kl")
    write_csv(
        folder / "rates.csv", columns, [(0.1, 1.9, 0.3, 0.1, 0.2), (0.25, 1.5, 0.2, 0.5, 0.4)]
    )
    page = open_page(run="rates")
    drawn = figure(page)["data"]
    assert [trace["name"] for trace in drawn] == ["by loss", "by KL"]
    assert [m.label for m in page.metric if m.label == "Held-out loss"] == []
    widget(page.button, "Use 0.25").click().run()
    assert widget(page.number_input, "Learning rate").value == 0.25
    assert widget(page.button, "Test learning rates").label
    tables = [d.value for d in page.dataframe if "method" in d.value.columns]
    assert all("rates" not in set(table["name"]) for table in tables)
