"""Runs over one another: each point is the run's own, and only settings that differ are listed."""

from __future__ import annotations

import numpy as np
import study_helpers as made

from core.charts import retrain as charts
from core.retrain import history
from core.retrain.results import Evaluation
from core.runs.workspace import read_run


def test_overlaid_runs_keep_their_points_and_name_what_differs(tmp_path):
    def evaluation(step, loss):
        return Evaluation(
            step=step, heldout_loss=loss, heldout_loss_dense=1.0, heldout_loss_before=3.0,
            recovered=(3.0 - loss) / 2, heldout_kl=None, recovered_kl=None,
        )  # fmt: skip

    runs = {"one": [evaluation(0, 3.0), evaluation(5, 2.0)], "two": [evaluation(0, 3.0)]}
    figure = charts.overlay(runs, "held-out loss")
    assert [(t.name, np.asarray(t.x).tolist(), np.asarray(t.y).tolist()) for t in figure.data] == [
        ("one", [0, 5], [3.0, 2.0]),
        ("two", [0], [3.0]),
    ]
    shares = charts.overlay(runs, "recovered").data[0]
    assert np.asarray(shares.y).tolist() == [0.0, 0.5]
    assert not np.asarray(charts.overlay(runs, "recovered by KL").data[0].x).size

    records = [
        read_run(made.run(tmp_path, name, "retrain", 1, checkpoint="cut", steps=steps, out=name))
        for name, steps in (("a", 5), ("b", 9))
    ]
    table = history.differing(records, lambda record: record.id)
    assert table.to_dict() == {"a": {"steps": "5"}, "b": {"steps": "9"}}
