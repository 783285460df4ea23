"""Recipe best: one budget becomes a measured variant, and bad budgets are refused at once."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import tiny
from run_helpers import wait_for

from core.__main__ import main
from core.budget import command as budget
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.prune import cautions
from core.prune.results import Pruning
from core.prune.version_results import VERSIONS
from core.recipes import best, sizing
from core.recipes.results import RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import jobs
from core.runs.workspace import read_json


def ppl_of(folder):
    with (folder / "perplexity.csv").open(newline="") as handle:
        return float(next(csv.DictReader(handle))["ppl"])


@pytest.mark.usefixtures("prepared_runs")
def test_a_budget_becomes_a_variant_with_its_verdict(tiny_gqa, place, tmp_path):
    texts = tmp_path / "train.txt", tmp_path / "eval.txt"
    for number, path in enumerate(texts):
        path.write_text(tiny.text(400, seed=number))
    limit = round(0.72 * headers.inspect(tiny_gqa).parameters)
    options = {"name": "best", "checkpoint": str(tiny_gqa), "params": limit, "device": "cpu",
               "data": ",".join(map(str, texts))}  # fmt: skip
    record = wait_for(jobs.launch("recipe", options, place), "done", "failed", seconds=200)
    assert record.state == "done", record.log_tail()
    found, figures = RecipeSummary.read(record.path), RecipeSummary.read(record.path).figures
    dense = ppl_of(record.path / "evaluate-dense")
    for name in ("solved", "healed"):
        cut = Pruning.read(record.path / name)
        assert cut.parameters_after <= limit
        ppl = ppl_of(record.path / f"evaluate-{name}")
        assert figures[f"{name}_ppl"] == pytest.approx(ppl)
        assert figures[f"{name}_ppl_over_dense"] == pytest.approx(ppl / dense)
        assert figures[f"{name}_latency"] > 0
        assert figures[f"{name}_keeps_budget"]
    assert Pruning.read(record.path / "solved").criterion == "budget"
    assert Pruning.read(record.path / "healed").healing.asked == "refit"
    assert not Pruning.read(record.path / "healed").removal.partial
    solved = Pruning.read(record.path / "solved")
    assert solved.healing.asked == "refit"
    assert solved.healing.kl_after <= solved.healing.kl_before
    plan = read_json(record.path / "plan-solved" / "plan-solved.json")
    assert plan["params"] == headers.inspect(record.path / "solved").parameters
    taken = min(("solved", "healed"), key=lambda name: figures[f"{name}_ppl"])
    assert figures["taken"] == taken
    assert found.verdict.startswith(f"Within params {limit:g}, take the variant that was ")
    assert figures["variant"] == f"{record.id}/{taken}"
    cut = Pruning.read(record.path / taken)
    told = any("lose their attention alone" in line for line in found.findings)
    assert told == cautions.is_like_measured(cut.removal, cut.blocks_before)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--latency", "1.1"), "--latency 1.1 is not below the dense model's"),
        (("--memory-gib", "0"), "--memory-gib must be above 0"),
        (("--ratio", "0.2"), "--ratio is not a budget of this recipe"),
        (("--data", "a,b,c"), "this recipe takes two sources, got 3"),
    ],
)
def test_bad_input_is_one_sentence_before_any_step(tiny_gqa, tmp_path, capsys, more, sentence):
    out = tmp_path / "out"
    assert main(["recipe", "best", str(tiny_gqa), "--out", str(out), *more]) == 2
    assert sentence in capsys.readouterr().err
    assert not (out / "versions").exists()


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [(32, {"length": 64}), (576, {"length": 144}), (4096, {"samples": 256, "length": 512})],
)
def test_healing_asks_for_more_rows_only_where_it_must(hidden, expected):
    info = SimpleNamespace(hidden=hidden, context=2048)
    assert sizing.rows_for(info, sizing.TOKENS, best.LEAST) == expected


def test_texts_are_sized_by_the_measured_rate(tiny_gqa, tmp_path):
    spec = RecipeSpec(
        name="best", checkpoint=str(tiny_gqa), out="x", time_limit_s=100.0, device="cpu"
    )
    rate = 1.0
    chain = SimpleNamespace(
        spec=spec,
        dir=lambda step: tmp_path / step,
        read=lambda step, kind: kind(flops_per_s=rate),
        seconds=lambda step: 10.0,
    )
    cut = Removal((2,), (3,), (), ((1, 8),))
    whole = sizing._flops(chain, 1, cut)
    left = sizing.PLANNED * (100 - 10 - 3 * sizing.STARTS - 20)
    least = sizing.Sizes(sizing.LEAST_ROWS, sizing.LEAST_TOKENS, sizing.LEAST_EVALUATED)
    assert sizing.sizes(chain, "versions", 1, cut) == least
    rate = whole / left * 1.01
    assert sizing.sizes(chain, "versions", 1, cut) == sizing.Sizes(10, 32, 32768)
    rate = whole / left * 0.7
    assert sizing.sizes(chain, "versions", 1, cut) == sizing.Sizes(7, 22, 22528)


def test_the_first_step_measures_what_fits(tiny_gqa, tmp_path, monkeypatch):
    spec = RecipeSpec(name="best", checkpoint=str(tiny_gqa), out="x", time_limit_s=100.0)
    chain = SimpleNamespace(spec=spec, dir=lambda step: tmp_path / step)
    asked = {v: budget.BudgetSpec(checkpoint=str(tiny_gqa), versions=v, out="")
             for v in (tuple(VERSIONS), sizing.FEW)}  # fmt: skip
    every, few = (budget.dry_run(one)["flops"] / 40 for one in asked.values())
    assert few < every
    for rate, versions, rows in (
        (every * 1.01, tuple(VERSIONS), 10),
        (few * 1.01, sizing.FEW, 10),
        (few * 0.61, sizing.FEW, 6),
        (1.0, sizing.FEW, 4),
    ):
        monkeypatch.setattr(sizing.pace, "expected", lambda *_, rate=rate: (rate, "measured"))
        assert sizing.first(chain, "versions") == {"versions": versions, "samples": rows}
