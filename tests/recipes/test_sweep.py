"""The sweep recipe: its grid, one real sweep, resuming, the time budget."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import tiny

from core.charts import retrain as charts
from core.errors import OptionError
from core.recipes import get, sweep
from core.recipes.chain import Chain
from core.recipes.spec import RecipeSpec
from core.runs.progress import SILENT


def spec_of(**options):
    return RecipeSpec(**{"name": "sweep", "out": "o", **options})


def test_every_combination_is_trained():
    spec = spec_of(grid=("lr=1e-3,3e-3", "rank=8", "seams=true,false"))
    assert sweep.combinations(spec) == [
        {"lr": lr, "rank": 8, "seams": seams} for lr in (1e-3, 3e-3) for seams in (True, False)
    ]
    names = [step.name for step in sweep.steps(spec)][-4:]
    assert names[0] == "lr-0.001-rank-8-seams-True"
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("speed=1,2", "'speed=1,2' is not an option of retrain"),
        ("out=a,b", "is not an option of retrain"),
        ("lr", "is not an option of retrain"),
        ("rank=eight", "--rank: invalid value 'eight'"),
        ("seams=maybe", "--seams: invalid value 'maybe'"),
        ("loss=mse", "--loss"),
        ("seed=" + ",".join(map(str, range(65))), "65 combinations"),
    ],
)
def test_a_grid_that_cannot_be_trained_is_one_sentence(grid, says):
    with pytest.raises(OptionError, match=says):
        sweep.check(spec_of(grid=(grid,)))


def test_a_sweep_is_resumed_and_the_best_is_within_its_time(tiny_gqa, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(60, seed=3))
    spec = spec_of(
        checkpoint=str(tiny_gqa), data=str(text), steps=2, grid=("lr=1e-3,1e-2",), device="cpu",
        ratio=0.2,
    )  # fmt: skip
    recipe = get("sweep")
    chain = Chain(spec, tmp_path / "sweep", SILENT)
    chain.run(recipe.steps(spec))
    found = recipe.verdict(chain)
    table = pd.read_csv(tmp_path / "sweep" / sweep.TABLE)
    assert table["lr"].tolist() == [1e-3, 1e-2]
    for name, row in zip(("lr-0.001", "lr-0.01"), table.itertuples(), strict=True):
        summary = json.loads((tmp_path / "sweep" / name / "summary.json").read_text())
        assert summary["settings"]["lr"] == row.lr
        assert row.heldout_loss == pytest.approx(summary["heldout_loss_after"])
    before = [chain.seconds(name) for name in ("lr-0.001", "lr-0.01")]
    chain.run(recipe.steps(spec))  # nothing is left to do
    assert [chain.seconds(name) for name in ("lr-0.001", "lr-0.01")] == before
    assert found.sentence.startswith(("Best of 2 trainings", "None of 2 trainings"))
    short = Chain(RecipeSpec(**{**vars(spec), "within": 0.0}), tmp_path / "sweep", SILENT)
    told = recipe.verdict(short).sentence
    assert told == "None of 2 trainings reports a recovery within 0 s of training."


def test_parallel_coordinates_have_the_tables_values():
    table = pd.DataFrame(
        {"loss": ["ce", "kl", "ce"], "lr": [1.0, 2.0, 3.0], "recovered": [0.1, 0.2, None],
         "recovered_kl": [None] * 3}
    )  # fmt: skip
    (drawn,) = charts.parallel(table, ["loss", "lr", "recovered", "recovered_kl"]).data
    assert [axis.label for axis in drawn.dimensions] == ["loss", "lr", "recovered"]
    assert list(drawn.dimensions[0]["values"]) == [0, 1, 0]
    assert list(drawn.dimensions[0].ticktext) == ["ce", "kl"]
