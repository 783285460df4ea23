"""The paper's seven tasks: lm-eval's own definitions over small local data of the same columns."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from lm_eval import tasks as harness

from core.__main__ import main
from core.errors import DataError
from core.evaluate import suites, zero_shot
from core.evaluate.results import read_samples

HARNESS = Path(harness.__file__).parent
FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
QUESTIONS = 16
NORMALISED = {"hellaswag", "arc_challenge", "openbookqa"}
"""Scored by log-likelihood over length in the paper; the others by log-likelihood."""
ENDS = ("cup", "red ball", "small boat by the river", "old book and a warm coat in the garden")


def example(task, rng):
    """Return one row with the columns of the task's data set, and which choice is right."""
    ends = rng.sample(ENDS, 4)
    subject = f"{rng.choice(('Ann', 'Ben', 'Cora'))} at {rng.choice(('home', 'noon', 'sea'))}"
    right = rng.randrange(2 if task in ("boolq", "piqa", "winogrande") else 4)
    choices = {"text": ends, "label": ["A", "B", "C", "D"]}
    rows = {
        "boolq": {"passage": f"{subject} is here.", "question": "is it so", "label": right},
        "piqa": {"goal": f"{subject} goes", "sol1": ends[0], "sol2": ends[1], "label": right},
        "hellaswag": {
            "activity_label": "Play", "ctx_a": f"{subject} sees.", "ctx_b": "then", "endings": ends,
            "label": str(right),
        },
        "winogrande": {
            "sentence": f"{subject} took _ home.", "option1": ends[0], "option2": ends[1],
            "answer": str(right + 1),
        },
        "openbookqa": {"question_stem": subject, "choices": choices, "answerKey": "ABCD"[right]},
    }  # fmt: skip
    arc = {"question": f"What has {subject}?", "choices": choices, "answerKey": "ABCD"[right]}
    return rows.get(task, arc), right


@pytest.fixture
def seven(tmp_path):
    """A folder with the seven tasks over local data, and the right answers of each."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    right = {}
    for task, file in FILES.items():
        rng = random.Random(task)
        made = [example(task, rng) for _ in range(QUESTIONS)]
        right[task] = [answer for _, answer in made]
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row, _ in made))
        splits = {split: str(data) for split in ("train", "validation", "test")}
        lines = [f"include: {HARNESS / file}", f"task: {task}", "dataset_path: json"]
        lines += ["dataset_name: null", f"dataset_kwargs: {json.dumps({'data_files': splits})}"]
        (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n")
    return folder, right


def share_right(samples, right, *, normalised):
    """The naive accuracy: the likeliest choice, by its length in characters where normalised."""
    hits = []
    for sample in samples:
        long = [len(choice) if normalised else 1 for choice in sample.choices]
        scores = [s / n for s, n in zip(sample.loglikelihoods, long, strict=True)]
        hits.append(scores.index(max(scores)) == right[sample.index])
    return sum(hits) / len(hits)


def test_each_has_the_papers_metric_and_ave_is_their_plain_mean(tmp_path, tiny_gqa, seven):
    folder, right = seven
    argv = ["evaluate", tiny_gqa, "--tasks", "paper", "--task-dir", folder, "--device", "cpu"]
    assert main([str(a) for a in (*argv, "--out", tmp_path / "out")]) == 0
    with (tmp_path / "out" / "tasks.csv").open(newline="") as handle:
        rows = {row["task"]: row for row in csv.DictReader(handle)}
    assert list(rows) == [*FILES, "AVE"]
    samples = read_samples(tmp_path / "out")
    values, differ = [], []
    for task in FILES:
        own = [sample for sample in samples if sample.task == task]
        plain, by_length = (share_right(own, right[task], normalised=n) for n in (False, True))
        values.append(by_length if task in NORMALISED else plain)
        differ.append(plain != by_length)
        assert rows[task]["metric"] == ("acc_norm" if task in NORMALISED else "acc")
        assert int(rows[task]["samples"]) == QUESTIONS
        assert float(rows[task]["value"]) == pytest.approx(values[-1])
    assert sum(differ) >= 3  # else the metric would not show
    assert float(rows["AVE"]["value"]) == pytest.approx(sum(values) / 7)


@pytest.mark.parametrize("task", FILES)
def test_without_a_network_each_is_one_clear_sentence(task):
    (place,) = suites.find([task])
    with pytest.raises(DataError) as raised:
        zero_shot.load(zero_shot.manager([place]), place)
    said = str(raised.value)
    assert said.startswith(f"The data of task '{task}' is not in this machine's cache")
    assert "--task-dir" in said
    assert "\n" not in said
