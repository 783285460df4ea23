"""What runs and checkpoints are called, and what a person notes about runs."""

from __future__ import annotations

from dataclasses import replace

import study_helpers as make

from core.runs.workspace import Remarks, Workspace, read_run, write_json
from core.study.names import names

TOTAL = 60_000


def test_every_run_and_checkpoint_has_one_readable_name(tmp_path, monkeypatch):
    root = tmp_path / "work"
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(root))
    dense = make.checkpoint(tmp_path / "llama")
    plan = {"criterion": "ppl", "protect_first": 1}
    made = make.pruned(
        root, "prune-1", dense, [3], 1.0, TOTAL, criterion="ppl", plan={"planned": plan}
    )
    make.pruned(root, "prune-2", dense, [2, 3], 2.0, TOTAL)
    make.run(root, "retrain-1", "retrain", 3.0, checkpoint="prune-1", method="lora",
             data="/data/alpaca.jsonl.gz")  # fmt: skip
    make.run(root, "retrain-2", "retrain", 4.0, checkpoint=made, method="lora",
             data="hub:tatsu-lab/alpaca:train")  # fmt: skip
    make.run(root, "evaluate-1", "evaluate", 5.0, checkpoint=root / "retrain-1" / "merged",
             perplexity=["auto"], tasks=["piqa"])  # fmt: skip
    make.run(root, "evaluate-2", "evaluate", 6.0, checkpoint="../work/prune-1", cwd=str(root),
             perplexity=["auto", "english", "c4"])  # fmt: skip
    make.run(root, "benchmark-1", "benchmark", 7.0, checkpoints=[str(dense), "prune-1", "prune-2"])
    make.run(root, "scores-1", "importance", 8.0, checkpoint=dense, calibration="auto")
    make.run(root, "scores-2", "importance", 9.0, checkpoint=dense, calibration="auto")
    where = Workspace(root)
    called = names(where.runs())
    label = called.checkpoint("prune-1")
    assert label.startswith("PPL")
    assert label.endswith("29%")  # its parameters over those of the dense folder, by its config
    assert called.runs == {
        "prune-1": f"{label} of llama",
        "prune-2": "llama without 2 to 3 (39%)",
        "retrain-1": f"LoRA of {label} on alpaca",
        "retrain-2": f"LoRA of {label} on tatsu-lab/alpaca",
        "evaluate-1": f"Evaluation of {label} + LoRA on the default text and piqa",
        "evaluate-2": f"Evaluation of {label} on english and 2 more",
        "benchmark-1": "Benchmark of llama and 2 others",
        "scores-1": "Scores of llama on english",
        "scores-2": "Scores of llama on english (2)",
    }
    assert called.in_words(f"behind {root / 'scores-1'}") == "behind Scores of llama on english"
    assert called.in_words("behind scores-2, then x-scores-1.") == (
        "behind Scores of llama on english (2), then x-scores-1."
    )
    where.rename(where.find("prune-1"), "My best")
    assert names(where.runs()).runs["evaluate-2"].startswith("Evaluation of My best on")


def test_remarks_are_kept_and_read_tolerantly(tmp_path):
    where = Workspace(tmp_path)
    folder = make.run(tmp_path, "one", "importance", 1.0, checkpoint="demo")
    record = where.remark(read_run(folder), tags=["paper", " to  keep", "paper", ""], starred=True)
    where.remark(record, note=" As in table 2. ")
    where.rename(record, "First")
    found = read_run(folder)
    assert found.given == "First"
    assert found.remarks == Remarks(("paper", "to keep"), "As in table 2.", True)
    assert where.remark(found, starred=False).remarks == replace(found.remarks, starred=False)
    write_json(folder / ".run" / "name.json", {"name": 3, "tags": ["a", 1], "starred": "yes"})
    assert (read_run(folder).given, read_run(folder).remarks) == ("", Remarks(("a",)))
