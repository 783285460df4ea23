"""A study's settings: defaults, what they mean for commands, their file, YAML, and text files."""

from __future__ import annotations

import dataclasses
import os

import pytest
import study_helpers as made

from core.demo import CHECKPOINT
from core.errors import DataError, InputError
from core.recipes import NAMES as RECIPES
from core.recipes.spec import RecipeSpec
from core.runs.spec import build
from core.runs.workspace import Workspace
from core.study import places, settings, sharing, store


@pytest.fixture
def where(tmp_path, monkeypatch):
    """An empty workspace beside a folder of texts that the server may list."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    (tmp_path / "ws").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.setenv(places.VARIABLE, str(tmp_path / "data"))
    return Workspace()


def test_demo_is_the_default_of_the_demo_alone(tmp_path):
    other = settings.defaults(made.checkpoint(tmp_path / "other"))
    assert {getattr(other, name) for name in settings.TEXTS} == {"english"}
    assert other.tasks == ()
    demo = settings.defaults(CHECKPOINT)
    assert {getattr(demo, name) for name in settings.TEXTS} == {"demo"}
    for given in ("", " auto "):
        text = settings.read({"evaluation": given, "limit": "many", "dtype": "int3"}, tmp_path)
        assert text == settings.defaults(tmp_path)


def test_settings_become_options_of_every_recipe():
    asked = settings.Settings(calibration="a.txt", evaluation="b.txt", training="c.jsonl",
                              tasks=("arc_easy",), limit=7, ratio=0.2, device="cpu")  # fmt: skip
    specs = {}
    for name in RECIPES:
        options = settings.recipe_options(asked, name)
        specs[name] = build(RecipeSpec, {"name": name, "checkpoint": "x", "out": "y", **options})
    assert specs["importance"].data == "a.txt"
    assert specs["depth-vs-width"].data == "a.txt,b.txt"
    assert specs["restore"].data == "c.jsonl"
    assert specs["restore"].ratio == 0.2
    assert specs["calibration"].data == ""  # it compares two datasets of its own
    assert (specs["paper-table"].tasks, specs["paper-table"].limit) == (("arc_easy",), 7)
    assert {spec.device for spec in specs.values()} == {"cpu"}


def test_a_folder_of_tasks_goes_wherever_tasks_are_asked(tmp_path):
    (tmp_path / "own.yaml").write_text("task: own\ncustom_dataset: !function load.load\n")
    asked = settings.Settings(tasks=("own", "demo"), task_dir=str(tmp_path))
    (sentence,) = settings.problems(asked)
    assert sentence.startswith("Task 'own' would run Python code: !function load")
    assert "--" not in sentence
    trusted = dataclasses.replace(asked, allow_task_code=True)
    assert settings.problems(trusted) == []
    for options in (settings.options_of(trusted, "evaluate"),
                    settings.recipe_options(trusted, "make"),
                    settings.recipe_options(trusted, "paper-table")):  # fmt: skip
        assert (options["task_dir"], options["allow_task_code"]) == (str(tmp_path), True)
    assert "task_dir" not in settings.options_of(settings.Settings(), "evaluate")
    (sentence,) = settings.problems(dataclasses.replace(asked, task_dir="no/such"))
    assert sentence.startswith("'Folder of custom tasks': no such folder: 'no/such'")

    text = sharing.to_yaml(trusted, "x").encode()  # consent is not carried by a file
    assert sharing.from_yaml(text, tmp_path)[0] == asked
    with pytest.raises(InputError, match="Unknown setting: allow_task_code"):
        sharing.from_yaml(text + b"allow_task_code: true\n", tmp_path)


def test_text_that_was_seen_before_is_one_sentence(tmp_path):
    text, copy, other = (tmp_path / name for name in ("a.txt", "copy.txt", "other.txt"))
    text.write_text("Ann sees the ball.\n")
    copy.write_text(text.read_text())
    other.write_text("Ben sees the boat.\n")
    (tmp_path / "link.txt").symlink_to(text)
    same = [("english", "english", False), ("wikitext2", "wikitext2", True), (text, other, False)]
    same += [(text, copy, True), (text, tmp_path / "link.txt", True), (f"{text}::a", text, True)]
    same += [(f"{text}::a", f"{text}::b", False), ("hub:o/n:train", "hub:o/n:train:text", True)]
    for one, two, expected in same:
        assert settings.same_text(str(one), str(two)) is expected, (one, two)
    asked = settings.Settings(calibration=str(text), evaluation=str(copy), training=str(copy))
    (sentence,) = settings.problems(asked)
    assert "copy.txt is also the calibration text and the training data" in sentence
    (sentence,) = settings.problems(dataclasses.replace(asked, evaluation="no/such.txt"))
    assert "there is no such file" in sentence


def test_a_study_has_one_file_which_may_be_damaged(where, tmp_path):
    dense = made.checkpoint(tmp_path / "dense")
    cut = made.pruned(where.root, "cut", dense, [1], 1, 99999)
    made.checkpoint(made.run(where.root, "tuned", "retrain", 2, checkpoint=cut) / "merged")
    kept = store.of(str(dense), where)
    assert not kept.asked
    asked = dataclasses.replace(kept.settings, limit=5, tasks=("a", "b"))
    store.save(dataclasses.replace(kept, settings=asked, asked=True).with_change("curve", {"n": 1}))
    for name in (str(dense), "cut", "tuned"):
        found = store.of(name, where)
        assert (found.settings, found.asked, found.problem) == (asked, True, "")
        assert found.changed("curve") == {"n": 1}
    assert store.of("demo", where).settings == settings.defaults(CHECKPOINT)

    kept.path.write_text('{"settings": {"limit": "x", "tasks": ["c"]}, "changes": {"a": 3}}')
    found = store.of("cut", where)
    assert (found.settings.limit, found.settings.tasks, dict(found.changes)) == (None, ("c",), {})
    kept.path.write_text("{")
    assert store.of("cut", where).problem.startswith("The settings of this study cannot be read")


def test_yaml_brings_back_what_was_saved(tmp_path):
    asked = settings.Settings(evaluation="ü.txt", tasks=("a", "b"), limit=5, ratio=0.25)
    text = sharing.to_yaml(asked, "smollm2")
    assert sharing.from_yaml(text.encode(), tmp_path) == (asked, "smollm2")
    assert sharing.from_yaml(b"depthcut_study: 1", tmp_path)[0] == settings.defaults(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is not a list of names"),
        ("- a", "it is not a list of names"),
        ("a: [", "not valid YAML (line 1)"),
        ("a: !!python/object/apply:os.system [id]", "not valid YAML"),
        ("calibration: english", "depthcut_study is None, not 1"),
        ("depthcut_study: 2", "depthcut_study is 2, not 1"),
        ("depthcut_study: 1\nsamples: 3", "Unknown setting: samples."),
        ("depthcut_study: 1\nlimit: 3\nlimit: 4", "limit is set twice."),
        ("depthcut_study: 1\nlimit: many", "limit: invalid value 'many'. Expected a whole number"),
        ("depthcut_study: 1\nratio: 2", "ratio: 2.0 is too large."),
        ("depthcut_study: 1\ntasks: demo", "tasks: invalid value 'demo'. Expected a list"),
        ("depthcut_study: 1\ndtype: int3", "dtype: unknown value 'int3'."),
        ("depthcut_study: 1\ndevice: 2024-01-01", "device: invalid value"),
        ("depthcut_study: 1\ncalibration: &a [*a]", "calibration: invalid value"),
        ("a: " + "x" * sharing.MOST_BYTES, "a study's settings have up to"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_other_yaml_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(InputError) as found:
        sharing.from_yaml(text.encode(), tmp_path)
    assert sentence in str(found.value)
    assert "\n" not in str(found.value)


def test_only_named_folders_are_listed(where, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.txt").write_text("x")
    data = tmp_path / "data"
    (data / "inner").mkdir()
    for name in ("a.txt", "b.jsonl.gz", "c.bin", ".hidden.txt"):
        (data / name).write_text("x")
    (data / "out").symlink_to(secret)
    (data / "key.txt").symlink_to(secret / "key.txt")
    (data / "same.txt").symlink_to(data / "a.txt")
    (data / "loop").symlink_to(data / "loop")
    found = places.listing(data, where)
    assert [path.name for path in found.sources] == ["a.txt", "b.jsonl.gz", "same.txt"]
    assert [path.name for path in found.folders] == ["inner"]
    assert found.above == (where.root,)
    for folder in (secret, data / "out", data / ".." / "secret", tmp_path, tmp_path / "data2"):
        with pytest.raises(DataError, match="is not in a folder that pages may list"):
            places.listing(folder, where)
    assert places.listing(data / "inner", where).above == (data, where.root)


def test_uploads_get_safe_names_and_are_stored_once(where):
    assert places.safe_name("../../etc/my text (1).TXT") == "my-text-1.txt"
    assert places.safe_name("..\\.rows.jsonl.gz") == "rows.jsonl.gz"
    first = places.keep("../a b.txt", b"one", where)
    assert first == where.root / places.UPLOADS / "a-b.txt"
    assert places.keep("a b.txt", b"one", where) == first
    assert places.keep("a b.txt", b"two", where).name == "a-b-2.txt"
    assert sorted(os.listdir(first.parent)) == ["a-b-2.txt", "a-b.txt"]
    for name, data in (("run.sh", b"x"), ("a.txt", b""), (".txt", b"")):
        with pytest.raises(DataError):
            places.keep(name, data, where)
