"""Tasks: the figures of lm-eval's own command line; presets, means, local tasks, errors."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.__main__ import main
from core.demo import CHECKPOINT, DATA
from core.errors import OptionError
from core.evaluate import generation, questions, suites
from core.evaluate.results import BlockCost, Score, read_samples
from core.runs.workspace import read_json

ROOT = Path(__file__).parents[2]
LIMIT = 12

LOCAL = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""


SUMS = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
  do_sample: false
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "^ (\\\\w+) nuts$"}}
      - {{function: take_first}}
  - name: flexible-extract
    filter:
      - {{function: regex, regex_pattern: "(one|two|three|four|five|six)", group_select: -1}}
      - {{function: take_first}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
"""Strict and flexible match as GSM8K has them, over the demo's words and local JSON lines."""


def add_sums(folder):
    """Add the task ``sums`` to a folder."""
    data = folder / "sums.jsonl"
    rows = [
        {"question": f"Anna had {n} nuts in a bag. Then Anna had", "answer": n}
        for n in ("two", "three", "four", "five")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(SUMS.format(data=data))


@pytest.fixture
def local_tasks(tmp_path):
    """A folder with a task of its own: multiple choice of several tokens, two metrics."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    ends = ["red ball", "small boat in the garden", "cup"]
    rows = [
        {"question": f"What does {name} see at {place}?", "options": ends, "answer": i % 3}
        for i, (name, place) in enumerate(
            (n, p) for n in ("Ann", "Ben", "Cora", "Dan") for p in ("home", "the river", "noon")
        )
    ]
    data = folder / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(LOCAL.format(data=data))
    return folder


def evaluate(folder, out, *more):
    """Call the command line; return tasks.csv's rows, samples and summary.json."""
    argv = ["evaluate", folder, "--out", out, "--device", "cpu", *more]
    assert main([str(a) for a in argv]) == 0
    with (out / "tasks.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    return rows, read_samples(out), read_json(out / "summary.json")


def harness(folder, tmp_path, tasks, *more):
    """Return results and samples of lm-eval's own command line, in a process of its own."""
    out = tmp_path / "harness"
    argv = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(tasks)]
    argv += ["--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"]
    argv += ["--batch_size", "4", "--output_path", str(out), "--log_samples", *map(str, more)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in tasks:
        (path,) = out.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


def test_equals_the_command_line_of_lm_eval(tmp_path, local_tasks):
    tasks = ["demo_possession", "demo_compare", "colours"]
    rows, samples, summary = evaluate(
        "demo", tmp_path / "out", "--tasks", ",".join(tasks), "--limit", LIMIT,
        "--task-dir", local_tasks, "--dtype", "float32",
    )  # fmt: skip
    both = tmp_path / "both"  # its command line takes one folder
    shutil.copytree(local_tasks, both / "local")
    shutil.copytree(suites.DEMO_TASKS, both / "demo" / "tasks")
    shutil.copytree(DATA, both / "demo" / "data")
    results, own = harness(CHECKPOINT, tmp_path, tasks, "--include_path", both, "--limit", LIMIT)
    assert [(r["task"], r["metric"]) for r in rows] == [
        ("demo_possession", "acc"), ("demo_compare", "acc"),
        ("colours", "acc"), ("colours", "acc_norm"),
    ]  # fmt: skip
    for row in rows:
        theirs = results[row["task"]]
        assert float(row["value"]) == theirs[f"{row['metric']},none"]
        assert float(row["stderr"]) == theirs[f"{row['metric']}_stderr,none"]
        assert int(row["samples"]) == LIMIT
    by_task = {t: [s for s in samples if s.task == t] for t in tasks}
    for task in tasks:
        assert len(by_task[task]) == LIMIT
        for ours, theirs in zip(by_task[task], own[task], strict=True):
            assert ours.index == theirs["doc_id"]
            assert ours.content == theirs["doc_hash"]
            likely = [float(answer[0]) for answer in theirs["filtered_resps"]]
            assert ours.loglikelihoods == pytest.approx(likely, abs=1e-3)
            assert ours.answer == likely.index(max(likely))
            assert ours.metrics["acc"] == theirs["acc"]
    assert summary["tasks"][0]["limit"] == LIMIT
    assert {"lm-eval", "datasets", "transformers"} <= set(summary["versions"])


def test_written_answers_equal_the_command_line_of_lm_eval(tmp_path, local_tasks):
    tasks = ["demo_open", "sums"]
    add_sums(local_tasks)
    rows, samples, summary = evaluate(
        "demo", tmp_path / "out", "--tasks", ",".join(tasks), "--limit", LIMIT,
        "--task-dir", local_tasks, "--dtype", "float32",
    )  # fmt: skip
    both = tmp_path / "both"
    shutil.copytree(local_tasks, both / "local")
    shutil.copytree(suites.DEMO_TASKS, both / "demo" / "tasks")
    shutil.copytree(DATA, both / "demo" / "data")
    results, own = harness(CHECKPOINT, tmp_path, tasks, "--include_path", both, "--limit", LIMIT)
    assert [(r["task"], r["metric"]) for r in rows] == [
        ("demo_open", "exact_match"), ("demo_open", "flexible_match"),
        ("sums", "exact_match,strict-match"), ("sums", "exact_match,flexible-extract"),
    ]  # fmt: skip
    for row in rows:
        name, _, which = row["metric"].partition(",")
        assert float(row["value"]) == results[row["task"]][f"{name},{which or 'none'}"]
    kinds = {k: v for asked in summary["tasks"] for k, v in asked["output_types"].items()}
    assert kinds == dict.fromkeys(tasks, "generate_until")
    for task in tasks:
        ours = {(s.index, s.filter): s for s in samples if s.task == task}
        assert len(ours) == len(own[task])
        for theirs in own[task]:
            mine = ours[theirs["doc_id"], theirs["filter"]]
            assert mine.generated == tuple(theirs["resps"][0])
            assert mine.metrics == {name: theirs[name] for name in theirs["metrics"]}
    found = generation.texts(tmp_path / "out", "sums")
    assert [text.index for text in found] == [0, 1, 2, 3]
    assert set(found[0].right) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert found[0].generated == ours[0, "strict-match"].generated[0]


def test_demo_accuracy_is_what_the_demo_documents():
    """docs/demo.md has 200 questions a skill; the shipped task files hold exactly those."""
    from core.demo.questions import questions as generate

    for skill in ("cause", "compare"):
        lines = (DATA / f"questions_{skill}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == generate(skill, 200, 0)


def test_demo_skills_equal_the_demos_own_evaluation(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from core.demo.evaluate import accuracy

    skills = ("cause", "counting")
    rows, _, _ = evaluate(
        "demo", tmp_path / "out", "--tasks", ",".join(f"demo_{s}" for s in skills), "--limit", 16
    )
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for row, skill in zip(rows, skills, strict=True):
        share = accuracy(model, tokenizer, skill, 16)
        assert float(row["value"]) == pytest.approx(share, abs=1e-12)
        error = math.sqrt(share * (1 - share) / 15)  # lm-eval's: the sample deviation
        assert float(row["stderr"]) == pytest.approx(error, abs=1e-12)


def test_means_are_plain_and_only_of_complete_presets():
    rows = [
        Score(task, metric, 0.1 * i, 0.01, 100)
        for i, (task, metric) in enumerate(suites.PAPER.items())
    ]
    other = Score("sciq", "acc", 0.9, 0.02, 50)
    (mean,) = questions.means([other, *rows])
    assert (mean.task, mean.metric) == ("AVE", "mean")
    assert mean.value == pytest.approx(0.3)
    assert mean.stderr == pytest.approx(0.01 / math.sqrt(7))
    assert mean.samples == 700
    assert questions.means([other, *rows[1:]]) == []
    assert questions.means([*rows[:-1], replace(rows[-1], stderr=None)])[0].stderr is None


def test_presets_are_known_tasks_with_the_papers_metrics():
    for names in suites.PRESETS.values():
        assert [place.name for place in suites.find(names)] == list(names)
    assert suites.expand(["paper", "boolq", "sciq"]) == (*suites.PAPER, "sciq")
    assert suites.PAPER["arc_easy"] == "acc"
    assert suites.PAPER["arc_challenge"] == "acc_norm"
    assert suites.metric_of("hellaswag", ["acc", "acc_norm"]) == "acc_norm"
    assert suites.metric_of("sciq", ["acc", "acc_norm"]) == "acc"


def test_the_catalog_has_what_lm_eval_has():
    """Compared on the folders of the presets with lm-eval's own index."""
    from lm_eval.tasks import TaskManager

    folders = {place.folder for names in suites.PRESETS.values() for place in suites.find(names)}
    known = suites.catalog()
    theirs = TaskManager(include_path=[str(f) for f in folders], include_defaults=False)
    missing = [name for name in theirs.all_tasks if name not in known]
    assert missing == []


def test_unknown_tasks_are_refused_with_near_names(local_tasks):
    with pytest.raises(OptionError, match="unknown task 'hellaswga'.*hellaswag"):
        suites.find(["hellaswga"])
    with pytest.raises(OptionError, match="unknown task 'colors'.*colours"):
        suites.find(["colors"], str(local_tasks))
    with pytest.raises(OptionError, match="no such folder: 'nowhere'"):
        suites.find(["colours"], "nowhere")


def test_a_task_whose_data_is_missing_says_so_before_anything_is_computed(
    tmp_path, capsys, monkeypatch
):
    from core.model import loading

    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded"))
    argv = ["evaluate", "demo", "--tasks", "demo_cause,piqa", "--out", str(tmp_path / "out")]
    argv += ["--perplexity", "demo"]
    assert main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror:" in line]
    assert len(errors) == 1
    assert "The data of task 'piqa' is not in this machine's cache" in errors[0]
    assert "HF_HOME" in errors[0]


def test_a_broken_task_file_is_named(tmp_path, local_tasks, capsys):
    (local_tasks / "colours.jsonl").unlink()
    argv = ["evaluate", "demo", "--tasks", "colours", "--task-dir", str(local_tasks)]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "Cannot load task 'colours'" in capsys.readouterr().err


def test_known_answers_are_reused_until_a_question_changes(tmp_path, local_tasks, monkeypatch):
    from core.evaluate import zero_shot

    where = tmp_path / "workspace"
    options = ("--tasks", "colours", "--task-dir", local_tasks)
    rows, samples, _ = evaluate("demo", where / "first", *options)
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "ask", lambda *_: pytest.fail("asked again"))
        again = evaluate("demo", where / "second", *options)
    assert again[:2] == (rows, samples)
    assert again[2]["tasks"][0]["reused_from"] == "first"
    assert (
        evaluate("demo", where / "less", *options, "--limit", 3)[2]["tasks"][0]["reused_from"]
        is None
    )
    data = local_tasks / "colours.jsonl"
    data.write_text(data.read_text().replace("Cora", "Clara"))
    changed = evaluate("demo", where / "third", *options)
    assert changed[2]["tasks"][0]["reused_from"] is None
    assert len(changed[1]) == len(samples)
    assert changed[1] != samples


@pytest.mark.parametrize("where", ["the same folder", "another"])
@pytest.mark.parametrize("each_block", [False, True])
def test_answers_of_a_run_that_did_not_finish_are_not_asked_again(
    tmp_path, tiny_gqa, local_tasks, monkeypatch, where, each_block
):
    from core.evaluate import block_tasks, zero_shot

    workspace = tmp_path / "workspace"
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(workspace))
    options = ["--tasks", "colours,demo_compare", "--task-dir", local_tasks, "--limit", 3]
    options += ["--each-block"] if each_block else []
    wanted = evaluate(tiny_gqa, tmp_path / "whole", *options)
    place, name = (block_tasks, "ask_without_each_block") if each_block else (zero_shot, "ask")
    plain, asked = getattr(place, name), []

    def dies(*arguments):
        task = next(a.name for a in arguments if hasattr(a, "local"))
        asked.append(task)
        if task == "demo_compare" and asked.count(task) == 1:
            raise RuntimeError("gone")
        return plain(*arguments)

    monkeypatch.setattr(place, name, dies)
    first = workspace / "first"
    argv = ["evaluate", tiny_gqa, "--out", first, "--device", "cpu", *options]
    assert main([str(a) for a in argv]) != 0
    assert asked == ["colours", "demo_compare"]
    assert not (first / "tasks.csv").exists() or each_block
    out = first if where == "the same folder" else workspace / "second"
    rows, samples, summary = evaluate(tiny_gqa, out, *options)
    assert asked == ["colours", "demo_compare", "demo_compare"]
    assert (rows, samples) == wanted[:2]
    part = summary["skills" if each_block else "tasks"]
    origin = None if out == first else "first"
    assert [task["reused_from"] for task in part] == [origin, None]
    if each_block:
        assert (out / "skills.csv").read_text() == (tmp_path / "whole/skills.csv").read_text()
    assert not (out / ".run/answers").exists()


@pytest.fixture
def bare(tmp_path, tiny_gqa):
    """The tiny checkpoint with a tokenizer that has neither BOS nor EOS."""
    folder = shutil.copytree(tiny_gqa, tmp_path / "bare")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        content = json.loads((folder / name).read_text())
        for key in ("bos_token", "eos_token", "post_processor"):
            content.pop(key, None)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_tokenizer_with_neither_bos_nor_eos_will_do(tmp_path, local_tasks, bare):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bare)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)
    rows, samples, _ = evaluate(
        bare, tmp_path / "out", "--tasks", "colours", "--task-dir", local_tasks, "--each-block"
    )
    assert [row["metric"] for row in rows] == ["acc", "acc_norm"]
    model = AutoModelForCausalLM.from_pretrained(bare).eval()
    for sample in samples:
        before = tokenizer(sample.question).input_ids
        wanted = []
        for choice in sample.choices:
            ids = torch.tensor([tokenizer(f"{sample.question} {choice}").input_ids])
            with torch.no_grad():
                likely = model(ids).logits[0].log_softmax(-1)
            places = range(len(before), ids.shape[1])
            wanted.append(sum(likely[i - 1, ids[0, i]].item() for i in places))
        assert sample.loglikelihoods == pytest.approx(wanted, abs=1e-3)
    dense = [r for r in BlockCost.read(tmp_path / "out") if r.block == -1]
    assert [row.value for row in dense] == [float(row["value"]) for row in rows]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({'"Q: {{question}}\\nA:"': '""'}, "no BOS token and no EOS. Set bos_token in"),
        (
            {"multiple_choice": "generate_until", "acc_norm": "exact_match", "acc": "bypass"},
            "no EOS token. Set eos_token in",
        ),
    ],
)
def test_a_token_that_a_task_needs_is_named(tmp_path, local_tasks, bare, capsys, changes, sentence):
    path = local_tasks / "colours.yaml"
    text = path.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    argv = ["evaluate", bare, "--tasks", "colours", "--task-dir", local_tasks]
    assert main([str(a) for a in (*argv, "--out", tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror:" in line]
    assert len(errors) == 1
    assert "Task 'colours'" in errors[0]
    assert sentence in errors[0]


@pytest.mark.parametrize("more", [(), ("--each-block",)])
def test_an_answer_longer_than_the_context_is_named(tmp_path, local_tasks, capsys, more):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4}))
    argv = ["evaluate", folder, "--tasks", "colours", "--task-dir", local_tasks]
    argv += ["--out", tmp_path / "out"]
    assert main([str(a) for a in (*argv, *more)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror:" in line]
    assert len(errors) == 1
    assert "Task 'colours' has an answer of " in errors[0]
    assert "the checkpoint's context has 4. Leave this task out." in errors[0]


def test_the_demo_s_tasks_are_found_without_a_look_at_the_files_of_lm_eval(monkeypatch):
    monkeypatch.setattr(suites, "_builtin", lambda: pytest.fail("looked at 10,000 files"))
    names = suites.expand(["demo"])
    assert [place.name for place in suites.find(names)] == list(names)
