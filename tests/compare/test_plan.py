"""What a plan takes from runs of the checkpoint that it stands for: accuracy and speed."""

from __future__ import annotations

import pytest
from study_helpers import benchmark, checkpoint, pruned, run

from core.checkpoint.drop import Removal
from core.compare.plan import accuracy_of, speed_of
from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import study

TOTAL = 60000
TASKS = ("task", "metric", "value", "stderr", "samples")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A workspace with a dense checkpoint, a cut of it, and a retrained one of the same blocks."""
    root = tmp_path / "workspace"
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(root))
    dense = checkpoint(tmp_path / "dense")
    pruned(root, "cut", dense, [3, 1], 1.0, TOTAL)
    pruned(root, "healed", dense, [3, 1], 2.0, TOTAL, healing={"method": "linear"})
    pruned(root, "other", dense, [2], 3.0, TOTAL)
    return root, dense


def scores(root, name, model, rows, started):
    folder = run(root, name, "evaluate", started, checkpoint=model)
    workspace.write_csv(folder / "tasks.csv", TASKS, rows)
    workspace.write_json(folder / "summary.json", {"device": "cpu"})


def test_accuracy_is_over_the_tasks_that_both_were_asked_alike(place):
    root, dense = place
    rows = [("a", "acc", 0.6, 0.1, 50), ("b", "acc_norm", 0.4, 0.1, 50)]
    scores(root, "e1", dense, [*rows, ("c", "acc", 0.9, 0.1, 50), ("mean", "mean", 1, 0, 1)], 4.0)
    found = study(Workspace(), str(dense))
    unknown = accuracy_of(found, Removal((1, 3)))
    assert unknown.value is None
    assert unknown.dense == pytest.approx((0.6 + 0.4 + 0.9) / 3)
    own = [("a", "acc", 0.5, 0.1, 50), ("b", "acc_norm", 0.2, 0.1, 50), ("c", "acc", 0.1, 0.1, 20)]
    scores(root, "e2", root / "healed", [("a", "acc", 0.99, 0.1, 50)], 5.0)
    scores(root, "e3", root / "cut", own, 6.0)
    known = accuracy_of(study(Workspace(), str(dense)), Removal((1, 3)))
    assert known.tasks == ("a", "b")  # c was asked fewer questions
    assert (known.value, known.dense) == (pytest.approx(0.35), pytest.approx(0.5))
    assert known.samples == 100
    assert accuracy_of(study(Workspace(), str(dense)), Removal()).value == pytest.approx(1.9 / 3)
    assert accuracy_of(study(Workspace(), str(dense)), Removal((2,))).value is None


def test_speed_is_that_of_the_same_blocks_batch_and_precision(place):
    root, dense = place
    entries = {"dense": str(dense), "cut": str(root / "cut"), "healed": str(root / "healed")}
    common = {"input_tokens": 12, "output_tokens": 128, "latency_s_std": 0.01, "runs": 20}
    rows = [
        {"variant": name, "batch_size": batch, "latency_s_mean": t * batch, "tokens_per_s": 128 / t,
         **common}
        for name, t in (("dense", 2.0), ("cut", 1.6), ("healed", 0.5)) for batch in (1, 4)
    ]  # fmt: skip
    benchmark(root, "bench", 7.0, entries, rows)
    found = study(Workspace(), str(dense))
    speed = speed_of(found, Removal((1, 3)), 4, "float32")
    assert speed.speed.factor == pytest.approx(1.25)
    assert (speed.tokens_per_s, speed.dense_tokens_per_s) == (80, 64)
    assert (speed.run, speed.device) == ("bench", "cpu")
    assert speed_of(found, Removal((1, 3)), 2, "float32") is None
    assert speed_of(found, Removal((1, 3)), 4, "bfloat16") is None
    assert speed_of(found, Removal((2,)), 4, "float32") is None
