"""The Budget section without a browser: what it draws is what the solver chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.__main__ import main
from core.charts import budget as charts
from core.checkpoint import headers
from core.prune import budgets, cautions
from core.prune.budgets import Limits
from core.prune.version_results import WHOLE, Budget, VersionRow
from core.runs import workspace

ROOT = Path(__file__).parents[2]
SHARE = {WHOLE: 1.0, "drop": 0.0, "no-attention": 0.6, "no-mlp": 0.45, "mlp50": 0.7}
KL = {WHOLE: 0.0, "drop": 0.5, "no-attention": 0.1, "no-mlp": 0.25, "mlp50": 0.02}
NEURONS = {WHOLE: 48, "drop": 0, "no-attention": 48, "no-mlp": 0, "mlp50": 24}


class Files:
    """Writes result files as a run does, into a folder."""

    def __init__(self, folder):
        self.folder = folder

    def write_json(self, name, value):
        workspace.write_json(self.folder / name, value)

    def write_csv(self, name, columns, rows):
        workspace.write_csv(self.folder / name, columns, rows)


@pytest.fixture
def measured(tmp_path, monkeypatch, tiny_gqa):
    """A workspace with one finished budget run of the tiny checkpoint."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    folder = tmp_path / "versions"
    (folder / ".run").mkdir(parents=True)
    spec = {"checkpoint": str(tiny_gqa), "out": str(folder)}
    workspace.write_json(folder / ".run" / "spec.json", {"command": "budget", "spec": spec})
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    info = headers.inspect(tiny_gqa)
    rest = info.parameters - sum(info.block_parameters)
    Budget(
        checkpoint_key=info.key, blocks=info.blocks, measured=tuple(SHARE)[1:], batch=1, context=64,
        calibration="demo", samples=4, length=32, seed=7, tokens=124, device="cpu", runs=3,
        compute_dtype="float32", timed_dtype="float32", rest_prefill_s=0.1, rest_decode_s=0.001,
        rest_params=rest, rest_weight_bytes=4 * rest,
    ).write(Files(folder))  # fmt: skip
    rows = [
        VersionRow(
            block, name, (1 + block) * KL[name], 2.0, share, share / 100,
            round(share * info.block_parameters[block]),
            4 * round(share * info.block_parameters[block]), NEURONS[name],
            0 if "attention" in name else 512,
        )
        for block in range(info.blocks)
        for name, share in SHARE.items()
    ]  # fmt: skip
    VersionRow.write(Files(folder), rows)
    return folder


def open_page(tiny_gqa):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.query_params["model"] = str(tiny_gqa)
    at.session_state["budget_form"] = True  # the form is open
    at.switch_page("pages/prune.py").run()
    assert not at.exception, at.exception
    return at


def test_a_plan_that_takes_many_attentions_says_what_that_has_cost(measured, capsys):
    told = set()
    for latency in ("0.9", "0.8", "0.6"):
        assert main(["plan", str(measured), "--latency", latency]) == 0
        out, said = capsys.readouterr()
        plan = json.loads(out)
        is_like = len(plan["attention"]) >= cautions.FROM * 5
        assert ("caution" in plan) == is_like == ("lose their attention alone" in said)
        told.add(is_like)
    assert told == {True, False}


def chart_of(at):
    specs = [json.loads(c.proto.spec) for c in at.get("plotly_chart")]
    return next(s for s in specs if any(t.get("name") == "KL alone" for t in s["data"]))


def removed(spec):
    parts = {t["name"].split()[0]: t["y"] for t in spec["data"] if "removed" in t["name"]}
    full = {part: [b for b, y in enumerate(ys) if y > 0.5] for part, ys in parts.items()}
    return full | {"half": [b for b, y in enumerate(parts["mlp"]) if 0.4 < y < 0.45]}


def test_moving_a_budget_solves_again_and_the_plan_goes_into_the_pad(measured, tiny_gqa):
    at = open_page(tiny_gqa)
    library = budgets.load(measured, "versions")
    latency = next(s for s in at.slider if s.key and s.key.startswith("budget_latency"))
    least = budgets.least(library, "latency", protect=(1, 1))
    assert latency.min == int(100 * least) + 1
    warned = set()
    for percent in (80, latency.min, 90):
        next(s for s in at.slider if s.key == latency.key).set_value(percent).run()
        solved = budgets.solve(library, Limits(latency=percent / 100), protect=(1, 1))
        gone = removed(chart_of(at))
        both = solved.removal
        assert gone["attention"] == sorted({*both.drop, *both.attention})
        assert gone["mlp"] == sorted({*both.drop, *both.mlp})
        assert gone["half"] == [block for block, _ in both.width]
        shown = {m.label: m.value for m in at.metric}
        assert shown["KL, predicted"] == f"{solved.figures.kl:.4f}"
        assert shown["Parameters"] == f"{solved.figures.params:,}"
        told = any("blocks lose their attention alone" in m.value for m in at.markdown)
        assert told == cautions.is_like_measured(both, library.blocks)
        warned.add(told)
        commands = [c.value for c in at.code if " plan " in c.value]
        assert any(f"--latency {percent / 100:g} " in f"{c} " for c in commands)
    assert warned == {True, False}
    params = next(s for s in at.slider if s.key and s.key.startswith("budget_params"))
    params.set_value(85).run()
    limits = Limits(latency=0.9, params=int(0.85 * library.dense().params))
    solved = budgets.solve(library, limits, protect=(1, 1))
    assert next(m.value for m in at.metric if m.label == "KL, predicted") == (
        f"{solved.figures.kl:.4f}"
    )
    next(b for b in at.button if b.key == "budget_take").click().run()
    assert not at.exception
    pad = at.session_state["prune_pad"]
    assert pad.removal.ordered == solved.removal.ordered
    commands = [c.value for c in at.code if "--criterion budget" in c.value]
    assert solved.removal.width
    width = ",".join(f"{block}:24" for block, _ in solved.removal.width)
    assert any(f"--mlp-width {width} --neurons versions" in c for c in commands)
    assert at.query_params["width"] in (width, [width])


def test_the_figure_says_what_every_block_could_become(measured):
    library = budgets.load(measured)
    choice = (WHOLE, "no-attention", "drop", "no-mlp", WHOLE)
    figure = charts.versions(library, choice, protected=(0,))
    costs = next(t for t in figure.data if t.name == "KL alone")
    assert list(costs.y) == pytest.approx([0, 0.2, 1.5, 1.0, 0])
    assert "block 2: dropped" in costs.customdata[2][0]
    assert "without attention: KL 0.3, saves 4 ms a step" in costs.customdata[2][0]
    left = {t.name: list(t.y) for t in figure.data}
    assert [round(v, 2) for v in left["attention left"]] == [0.84, 0, 0, 0.84, 0.84]
    assert [round(v, 2) for v in left["mlp left"]] == [0.84, 0.84, 0, 0, 0.84]


def test_a_damaged_run_is_one_sentence(measured, tiny_gqa):
    rows = VersionRow.read(measured)
    VersionRow.write(Files(measured), [r for r in rows if r.block != 3])
    at = open_page(tiny_gqa)
    assert any("is not a finished budget run" in w.value for w in at.warning)


def test_the_launcher_estimates_and_names_the_command(tmp_path, monkeypatch, tiny_gqa):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    at = open_page(tiny_gqa)
    assert any(c.value.startswith("python -m core budget ") for c in at.code)
    captions = " ".join(c.value for c in at.caption)
    assert "KL of 30 versions" in captions
    start = next(b for b in at.button if b.key == "budget_start")
    assert not start.disabled


def test_compare_draws_the_frontier(measured, tiny_gqa):
    def page(folder):
        from core.checkpoint import headers
        from core.ui import budget_form

        budget_form.compared(headers.inspect(folder))

    at = AppTest.from_function(page, default_timeout=60, kwargs={"folder": str(tiny_gqa)}).run()
    spec = json.loads(at.get("plotly_chart")[0].proto.spec)
    line = next(t for t in spec["data"] if t.get("name") == "solved, predicted")
    library = budgets.load(measured, "versions")
    for share, kl in zip(line["x"], line["y"], strict=True):
        solved = budgets.solve(library, Limits(latency=share + 1e-9), protect=(1, 1))
        assert solved.figures.kl == pytest.approx(kl)
    assert any("No plan of this run was measured whole" in c.value for c in at.caption)
