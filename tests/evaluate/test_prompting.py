"""Few-shot examples and chat templates: the requests and figures of lm-eval's command line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from chat_templates import CHATML

from core.__main__ import main
from core.errors import OptionError
from core.evaluate import by_content
from core.evaluate.results import Prompting, Summary, read_samples
from core.evaluate.spec import EvaluateSpec, check_model, check_template
from core.runs.workspace import Workspace

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/test.jsonl
    train: {folder}/train.jsonl
output_type: multiple_choice
test_split: test
training_split: train
fewshot_split: train
description: "Answer in a word."
doc_to_text: "Q: {{{{question}}}}"
doc_to_choice: [red, blue, green]
doc_to_target: answer
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    tiny.write(folder, max_position_embeddings=512)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for split, count in (("test", 6), ("train", 8)):
        rows = (
            {"question": f"{split} {i}: what does Ann see?", "answer": i % 3} for i in range(count)
        )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    (folder / "colours.yaml").write_text(TASK.format(folder=folder))
    return folder


def ours(checkpoint, tasks, out, *options):
    argv = ["evaluate", checkpoint, "--out", out, "--tasks", "colours", "--task-dir", tasks]
    argv += ["--dtype", "float32", "--device", "cpu", *options]
    assert main([str(a) for a in argv]) == 0
    (asked,) = Summary.read(out).tasks
    return asked, read_samples(out)


def theirs(checkpoint, tasks, out, monkeypatch, *options):
    """Run lm-eval's own command line in this process; return its samples."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    whole = TaskManager.__init__
    monkeypatch.setattr(  # its own tasks are not needed here, and reading them takes long
        TaskManager, "__init__", lambda *a, **kw: whole(*a, **{**kw, "include_defaults": False})
    )

    argv = ["lm_eval", "run", "--model", "hf", "--tasks", "colours", "--include_path", tasks]
    argv += ["--model_args", f"pretrained={checkpoint},dtype=float32", "--device", "cpu"]
    argv += ["--batch_size", "8", "--output_path", out, "--log_samples", *options]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cli_evaluate()
    (path,) = Path(out).rglob("samples_colours_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("own", "harness"),
    [
        (["--fewshot", 2], ["--num_fewshot", 2]),
        (["--chat-template", "--fewshot", 2], ["--apply_chat_template", "--num_fewshot", 2]),
        (
            ["--chat-template", "--fewshot", 1, "--fewshot-turns", "off",
             "--system-instruction", "Be brief."],
            ["--apply_chat_template", "--num_fewshot", 1, "--fewshot_as_multiturn", "false",
             "--system_instruction", "Be brief."],
        ),
    ],
    ids=["few-shot", "chat", "one message"],
)  # fmt: skip
def test_equals_lm_evals_options(checkpoint, tasks, tmp_path, monkeypatch, own, harness):
    asked, samples = ours(checkpoint, tasks, tmp_path / "ours", *own)
    own_lines = theirs(checkpoint, tasks, tmp_path / "theirs", monkeypatch, *harness)
    assert len(samples) == len(own_lines) == 6
    for one, line in zip(samples, own_lines, strict=True):
        requests = line["arguments"]
        assert one.question == requests["gen_args_0"]["arg_0"]  # with examples and template
        likely = [float(answer[0]) for answer in line["filtered_resps"]]
        assert one.loglikelihoods == pytest.approx(likely, abs=1e-3)
        assert one.metrics["acc"] == line["acc"]
    assert asked.prompting.chat_template == ("--chat-template" in own)
    assert asked.shots == {"colours": asked.prompting.fewshot}
    turns = samples[0].question.count("<|im_start|>user")
    assert turns == {"few-shot": 0, "chat": 3, "one message": 1}[
        "few-shot" if not asked.prompting.chat_template
        else "chat" if asked.prompting.multiturn else "one message"
    ]  # fmt: skip


def test_results_with_other_options_are_other_measures(checkpoint, tasks, tmp_path, monkeypatch):
    """Neither reused nor compared, but in tables side by side."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    plain, _ = ours(checkpoint, tasks, tmp_path / "1")
    chat, _ = ours(checkpoint, tasks, tmp_path / "2", "--chat-template")
    again, _ = ours(checkpoint, tasks, tmp_path / "3", "--chat-template")
    assert plain.key != chat.key == again.key
    assert chat.reused_from is None
    assert again.reused_from
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    (changed / "chat_template.jinja").write_text(CHATML + " ")
    other, _ = ours(changed, tasks, tmp_path / "4", "--chat-template")
    assert other.key != chat.key

    class Variant:
        label, folder = "tiny", checkpoint

    (found,) = by_content.gather(Workspace(tmp_path), [Variant()])
    labels = [m.label for m in by_content.measures([found], None)]
    assert sorted(labels) == ["colours (acc)", "colours (acc, chat template)"]


def test_contradictions_and_missing_templates_are_one_sentence(checkpoint, tasks, tmp_path):
    def spec(**options):
        return EvaluateSpec(checkpoint="x", out="y", **options)

    with pytest.raises(OptionError, match="are about tasks"):
        check_model(spec(perplexity=("demo",), fewshot=1), None)
    with pytest.raises(OptionError, match="has no turns"):
        check_model(spec(tasks=("piqa",), fewshot_turns="on"), None)
    with pytest.raises(OptionError, match="x has no chat template"):
        check_template(spec(tasks=("piqa",), chat_template=True), tmp_path)
    check_template(spec(tasks=("piqa",), chat_template=True), checkpoint)
    assert Prompting().label == ""
    assert Prompting(fewshot=5, chat_template=True).label == (
        "5-shot, chat template, examples in one message"
    )


def test_a_template_that_refuses_a_question_says_why(checkpoint, tasks, tmp_path, capsys):
    strict = tmp_path / "strict"
    shutil.copytree(checkpoint, strict)
    never = "{{ raise_exception('Only tools may speak.') }}"
    (strict / "chat_template.jinja").write_text(never)
    argv = ["evaluate", strict, "--out", tmp_path / "o", "--tasks", "colours", "--task-dir", tasks]
    assert main([str(a) for a in [*argv, "--chat-template"]]) == 2
    assert "does not accept a question of task 'colours': Only tools" in capsys.readouterr().err
