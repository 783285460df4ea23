"""Tasks of another folder run Python only with consent, and are refused by name without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.__main__ import main
from core.demo import CHECKPOINT
from core.errors import DataError, OptionError
from core.evaluate import suites, task_code

ROOT = Path(__file__).parents[2]
TASK = """
task: {name}
custom_dataset: !function evil.load
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: options
doc_to_target: answer
metric_list:
  - metric: acc
"""
CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
import datasets
def load(**_):
    rows = {"question": ["Q"], "options": [["a", "b"]], "answer": [0]}
    return {"test": datasets.Dataset.from_dict(rows)}
"""
CLEAN = 'task: clean\ndataset_path: json\ndoc_to_text: "!function in a text"\n# !function x.y\n'


@pytest.fixture
def folder(tmp_path):
    """A folder of tasks: one that runs code, one that includes it, a group, a tag, a clean one."""
    where = tmp_path / "tasks"
    (where / "deep").mkdir(parents=True)
    (where / "evil.py").write_text(CODE)
    files = {
        "direct.yaml": TASK.format(name="direct"),
        "base.inc": "custom_dataset: !function evil.load\n",
        "middle.yaml": "include: base.inc\n",
        "included.yaml": "task: included\ninclude: [middle.yaml]\n",
        "deep/tagged.yaml": "task: tagged\ntag:\n  - risky\n  - b\nprocess_docs: !function a.b\n",
        "group.yaml": "group: grouped\ntask:\n  - clean\n  - direct\n",
        "inline.yaml": "group: inline\ntask:\n  - task: x\n    include: middle.yaml\n",
        "nested.yaml": "task: nested\nfilter_list: [{filter: [{function: !function a.b}]}]\n",
        "metric.yaml": "task: metric\nmetric_list: [{metric: evil/m, hf_evaluate: true}]\n",
        "merged.yaml": "x: &a {process_docs: !function a.b}\ntask: merged\n<<: *a\n",
        "python.yaml": "task: python\nx: !!python/object/apply:os.system [ls]\n",
        "broken.yaml": "task: broken\nx: [1, {\n",
        "clean.yaml": CLEAN,
        "cleantag.yaml": "task: cleantag\ntag: pure\ninclude: [cleantag.yaml, missing.yaml]\n",
    }
    for name, text in files.items():
        (where / name).write_text(text)
    return where


RISKY = {
    "direct": "!function evil.load", "included": "!function evil.load", "grouped": "evil.load",
    "risky": "!function a.b", "tagged": "!function a.b", "inline": "!function evil.load",
    "nested": "!function a.b", "metric": "hf_evaluate: true", "merged": "!function a.b",
    "python": "python/object/apply", "broken": "cannot be parsed",
}  # fmt: skip


@pytest.mark.parametrize("name", RISKY)
def test_a_task_that_runs_code_is_refused_by_name(folder, name):
    places = suites.find([name], str(folder))
    with pytest.raises(OptionError) as raised:
        task_code.check(places, allowed=False)
    assert f"Task '{name}' would run Python code: " in str(raised.value)
    assert RISKY[name] in str(raised.value)
    assert "--allow-task-code" in raised.value.hint
    task_code.check(places, allowed=True)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("names", [["clean"], ["cleantag"], ["pure"], ["demo"], ["paper"]])
def test_tasks_without_code_of_others_need_no_consent(folder, names):
    task_code.check(suites.find(suites.expand(names), str(folder)), allowed=False)


def test_all_refused_tasks_are_named(folder):
    places = suites.find(["clean", "direct", "tagged", "nested"], str(folder))
    with pytest.raises(OptionError, match="'direct' would .* \\(so do 'tagged', 'nested'\\)"):
        task_code.check(places, allowed=False)


def test_the_command_line_refuses_before_anything_runs(folder, tmp_path, capsys):
    argv = ["evaluate", "demo", "--tasks", "clean,direct", "--task-dir", str(folder)]
    for more in (["--dry-run"], []):
        assert main([*argv, "--out", str(tmp_path / "out"), "--device", "cpu", *more]) == 2
        assert "Task 'direct' would run Python code" in capsys.readouterr().err
    assert not (folder / "ran").exists()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_consent_is_recorded_and_the_task_is_asked(folder, tmp_path):
    argv = ["evaluate", str(CHECKPOINT), "--tasks", "direct", "--task-dir", str(folder)]
    argv += ["--out", str(tmp_path / "out"), "--device", "cpu", "--allow-task-code"]
    assert main(argv) == 0
    spec = json.loads((tmp_path / "out" / ".run" / "spec.json").read_text())
    assert spec["spec"]["allow_task_code"] is True
    assert (folder / "ran").exists()


def test_lm_eval_itself_imports_nothing_without_consent(folder):
    from core.evaluate import zero_shot

    (place,) = suites.find(["direct"], str(folder))
    with pytest.raises(DataError, match="Cannot load task 'direct': PermissionError"):
        zero_shot.load(zero_shot.manager([place]), place)
    assert not (folder / "ran").exists()
    assert zero_shot.load(zero_shot.manager([place], allow_code=True), place)["tasks"]
    assert (folder / "ran").exists()


def test_templates_cannot_reach_python_without_consent(folder):
    import jinja2
    from lm_eval import utils

    from core.evaluate import zero_shot

    reach = "{{ cycler.__init__.__globals__.os.getpid() }}"
    (place,) = suites.find(["clean"], str(folder))
    zero_shot.manager([place])
    with pytest.raises(jinja2.exceptions.SecurityError):
        utils.apply_template(reach, {})
    assert utils.apply_template("{{a|regex_replace('b', 'c')}} {{a.upper()}}", {"a": "b"}) == "c B"
    zero_shot.manager([place], allow_code=True)
    assert utils.apply_template(reach, {}).isdigit()


def test_the_page_asks_for_consent_with_the_reason(folder, tmp_path, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=90)
    at.query_params["model"] = "demo"
    at.run()
    at.switch_page("pages/evaluate.py").run()
    assert not [c for c in at.checkbox if c.key == "in_evaluate_allow_task_code"]
    at.text_input(key="in_evaluate_task_dir").set_value(str(folder))
    at.multiselect(key="in_evaluate_tasks").set_value(["demo"])
    at.run()
    assert "with your rights" in at.checkbox(key="in_evaluate_allow_task_code").help
    monkeypatch.setattr("core.evaluate.suites.PRESETS", {"demo": ("direct",)})
    at.run()
    assert any("'direct' would run Python code" in e.value for e in at.error)
    at.checkbox(key="in_evaluate_allow_task_code").check().run()
    assert not at.error
    assert any("--allow-task-code" in c.value for c in at.code)
    assert not (folder / "ran").exists()
