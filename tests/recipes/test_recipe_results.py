"""A recipe's files as dataclasses: columns as before, and a chain says which file is missing."""

from __future__ import annotations

import json

import pytest

from core.errors import RunError
from core.prune.results import Pruning
from core.prune.score_results import BlockRow
from core.recipes.chain import Chain
from core.recipes.results import CalibrationRow, PaperRow, RecipeSummary, RetrainRow, StepTime
from core.recipes.spec import RecipeSpec
from core.runs.progress import SILENT


@pytest.fixture
def chain(tmp_path):
    return Chain(RecipeSpec(name="restore", out=str(tmp_path)), tmp_path, SILENT)


def test_the_tables_have_their_columns():
    assert CalibrationRow.columns() == ("calibration", "evaluated", "ppl", "ratio", "dropped")
    assert ",".join(RetrainRow.columns()) == "variant,evaluated_on,measure,value,spread,items"
    assert ",".join(PaperRow.columns()) == (
        "kind,model,criterion,blocks_dropped,params,ratio,retrained,text,ppl,tasks_mean,"
        "tasks_stderr,speedup,source"
    )


def test_a_summary_comes_back_as_written(chain):
    given = RecipeSummary(
        recipe="restore", verdict="It came back.", findings=("a", "b"), figures={"x": [1]},
        failed={"tasks": "no network"}, steps=(StepTime("scores", "importance", 1.5),),
    )  # fmt: skip
    given.write(chain)
    assert RecipeSummary.read(chain.folder) == given
    written = json.loads((chain.folder / "summary.json").read_text())
    assert written["steps"] == [{"name": "scores", "command": "importance", "seconds": 1.5}]


def test_a_missing_file_of_a_step_is_named(chain):
    with pytest.raises(RunError, match=r"Step cut did not write pruning\.json"):
        chain.read("cut", Pruning)
    with pytest.raises(RunError, match=r"Step scores did not write blocks\.csv"):
        chain.table("scores", BlockRow)
    with pytest.raises(RunError, match=r"Step plan did not write plan\.json"):
        chain.plan("plan")
