"""What goes wrong from outside: kills, other teachers, too little text; one clear sentence each."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from retrain_helpers import dies_after, execute, summary
from safetensors.torch import load_file

from core.retrain import caches, teacher

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
sys.path[:0] = [ROOT, ROOT + "/tests"]
from core.retrain import row_cache
usual = row_cache.save_file
def dying(*given):
    usual(*given)
    os.kill(os.getpid(), signal.SIGKILL)
row_cache.save_file = dying
from core.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def options(pruned, dense, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    return {
        "checkpoint": str(pruned), "dense": str(dense), "data": tasks, "template": "plain",
        "cutoff": 96, "steps": 4, "batch": 4, "micro_batch": 2, "holdout": 4, "eval_every": 2,
        "warmup": 0, "out": str(tmp_path / "run"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "goal"), [("full", "kl"), ("continued", "both"), ("lora", "both")]
)
def test_resuming_equals_an_uninterrupted_run(options, tmp_path, monkeypatch, method, goal):
    about = {**options, "method": method, "loss": goal, "lr": 1e-3, "merge": True}
    assert execute(**about) == 0
    again = {**about, "out": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        dies_after(patch, 3)
        assert execute(**again) == 1
    assert execute(**again, resume=True) == 0
    one, other = (
        load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("run", "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_kill_9_while_the_cache_is_written_leaves_nothing_that_counts(options, tmp_path):
    argv = ["retrain", options["checkpoint"], "--method", "lora", "--loss", "kl"]
    for name in ("dense", "data", "template", "cutoff", "steps", "batch", "holdout", "out"):
        argv += [f"--{name}", str(options[name])]
    code = f"ROOT = {str(ROOT)!r}\n{KILLED}"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
    folder = tmp_path / "workspace" / caches.FOLDER
    (draft,) = folder.iterdir()
    assert "." in draft.name  # not yet a cache's name
    assert not (draft / caches.COMPLETE).exists()
    options = {**options, "method": "lora", "loss": "kl", "out": str(tmp_path / "next")}
    assert execute(**options) == 0
    (whole,) = folder.iterdir()
    assert whole.name == draft.name.partition(".")[0]
    assert (whole / caches.COMPLETE).is_file()


def test_other_rows_or_another_teacher_read_the_dense_model_again(
    options, texts, tiny_gqa, tmp_path, monkeypatch
):
    calls = []
    usual = teacher.write
    monkeypatch.setattr(teacher, "write", lambda *given: (calls.append(given[0]), usual(*given))[1])
    about = {**options, "method": "lora", "loss": "kl"}
    for number, change in enumerate(({}, {}, {"data": texts}, {"dense": str(tiny_gqa)})):
        assert execute(**{**about, **change, "out": str(tmp_path / str(number))}) == 0
    assert len(set(calls)) == len(calls) == 3  # the second run shares the first one's


@pytest.mark.parametrize("goal", ["ce", "kl"])
def test_a_teacher_with_another_vocabulary_is_refused(options, tiny_dir, goal, capfd):
    other = {**options, "method": "lora", "loss": goal, "dense": "demo"}
    assert execute(**other) == 2
    told = capfd.readouterr().err
    assert "The dense model has a vocabulary of" in told
    assert "Traceback" not in told


def test_a_single_row_of_text_is_refused_and_two_are_enough(options, tmp_path, capfd):
    line = "one small bird sang in the old garden by the river all day\n"
    short = tmp_path / "short.txt"
    short.write_text(line)
    about = {**options, "method": "lora", "data": str(short), "steps": 1, "eval_every": 1}
    assert execute(**about) == 2
    assert "has no usable rows to train on: none of its 1 rows" in capfd.readouterr().err
    short.write_text(line + "another bird slept\n")
    assert execute(**{**about, "out": str(tmp_path / "two")}) == 0
    assert summary(tmp_path / "two")["state"] == "done"
