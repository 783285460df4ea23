"""A recipe evaluates on text that it did not calibrate or train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from core import recipes
from core.errors import InputError, OptionError
from core.recipes import texts
from core.recipes.chain import Chain
from core.recipes.command import RecipeSpec
from core.runs import workspace
from core.runs.progress import SILENT


def chain(folder, data, name="drop-one", checkpoint="demo"):
    spec = RecipeSpec(name=name, checkpoint=str(checkpoint), out=str(folder), data=str(data))
    return Chain(spec, folder, SILENT)


def rows(path):
    return [row["text"] for row in workspace.json_lines(Path(path))]


@pytest.mark.parametrize("name", ["drop-one", "depth-vs-width"])
def test_nothing_is_evaluated_on_text_that_it_was_chosen_by(tmp_path, tiny_gqa, name):
    lines = [f"Line {i} of the text." for i in range(50)]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    made = chain(tmp_path, text, name, tiny_gqa)
    steps = [s for s in recipes.get(name).steps(made.spec) if callable(s.values)]
    kinds = ("importance", "width", "evaluate")
    found = {s.name: s.values(made) for s in steps if s.command in kinds}
    chosen = {values["calibration"] for values in found.values() if "calibration" in values}
    judged = {values["perplexity"] for values in found.values() if "perplexity" in values}
    (chosen_by,), ((judged_by,),) = chosen, judged
    assert not set(rows(chosen_by)) & set(rows(judged_by))
    assert sorted(rows(chosen_by) + rows(judged_by)) == sorted(lines)
    assert len(rows(judged_by)) == 5


def test_sources_are_the_published_split_or_two(tmp_path):
    assert texts.apart(chain(tmp_path, "")) == ("demo", "demo")
    train, test = texts.apart(chain(tmp_path, "wikitext2"))
    assert ":train:" in train
    assert test == "wikitext2"
    assert texts.apart(chain(tmp_path, "a.jsonl, b.txt")) == ("a.jsonl", "b.txt")
    with pytest.raises(OptionError, match="takes two sources, got 3"):
        texts.apart(chain(tmp_path, "a,b,c"))


def test_one_row_cannot_be_split(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One line only.")
    with pytest.raises(InputError, match=r"too few rows \(1\)"):
        texts.apart(chain(tmp_path, text))
