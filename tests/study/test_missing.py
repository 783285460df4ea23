"""Which variants have not been evaluated in a given way."""

from __future__ import annotations

import pytest
import study_helpers as made

from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import study
from core.study.missing import unevaluated


@pytest.fixture
def known(tmp_path):
    """A dense checkpoint and two cuts; one cut lacks the tasks, the other everything."""
    root, dense = tmp_path / "ws", made.checkpoint(tmp_path / "dense")
    cuts = [made.pruned(root, f"cut{n}", dense, [n], n, 60_000) for n in (1, 2)]
    for number, (folder, asked) in enumerate(((dense, 40), (cuts[0], None))):
        run = made.run(root, f"evaluate-{number}", "evaluate", 10 + number, checkpoint=folder)
        columns = ("source", "window", "bos", "tokens", "ppl")
        workspace.write_csv(run / "perplexity.csv", columns, [("english", 128, "once", 999, 9.0)])
        texts = [{"source": "english", "window": 128, "bos": "once", "tokens": 999, "ppl": 9.0,
                  "windows": 8, "max_tokens": 1024}]  # fmt: skip
        workspace.write_json(run / "summary.json", {"perplexity": texts})
        if asked:
            columns = ("task", "metric", "value", "stderr", "samples")
            rows = [(f"demo_{skill}", "acc", 0.5, 0.1, asked) for skill in ("cause", "order")]
            workspace.write_csv(run / "tasks.csv", columns, rows)
    return study(Workspace(root), str(dense))


def names(known, **more):
    usual = {"texts": ["english"], "windows": [128], "max_tokens": 1024}
    found = unevaluated(known, **{**usual, **more})
    return [v.folder.name for v in found]


def test_only_results_in_exactly_this_way_count(known):
    assert names(known) == ["cut2"]
    tasks = ("demo_cause", "demo_order")
    assert names(known, tasks=tasks, limit=40) == ["cut1", "cut2"]
    everyone = ["dense", "cut1", "cut2"]
    assert names(known, tasks=("demo",), limit=40) == everyone  # six of its skills were not asked
    for other in (
        {"texts": ["demo"]}, {"windows": [256]}, {"windows": [128, 256]}, {"bos": "window"},
        {"max_tokens": None}, {"max_tokens": 2048}, {"tasks": tasks, "limit": 20},
        {"tasks": tasks, "limit": 40, "prompting": "chat template"},
    ):  # fmt: skip
        assert names(known, **other) == everyone, other
    assert names(known, texts=()) == []
