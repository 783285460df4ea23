"""Scores from elsewhere: what is kept of an upload, and what is refused in one sentence."""

from __future__ import annotations

import pytest

from core.errors import DataError
from core.prune import imported
from core.runs.workspace import Workspace


@pytest.fixture
def where(tmp_path):
    return Workspace(tmp_path)


def test_every_published_layout_becomes_a_named_table(where):
    texts = {
        "ppl.all.csv": ("removed_block,ppl_bookcorpus,params\n0.0,9.5,7\n1.0,8.5,7\n", "ppl",
                        (9.5, 8.5)),
        "taylor_score.csv": ("block_name,block_score\nmodel.layers.0,4\nmodel.layers.1,5\n"
                             "lm_head,1\n", "taylor", (4.0, 5.0)),
        "magnitude.order.csv": ("1,0\n", "magnitude", (1.0, 0.0)),
        "../../evil.csv": ("block,score\n0,1\n1,2\n", "ppl", (1.0, 2.0)),
    }  # fmt: skip
    for name, (text, criterion, values) in texts.items():
        path = imported.keep(name, text.encode(), imported.guessed(name), 2, where, "s")
        assert path.parent == where.root / imported.FOLDER / "s"
        assert imported.columns_of(path) == {criterion: values}
    assert len(imported.listed(where, "s")) == len(texts)
    assert imported.listed(where, "other") == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("block,score\n0,1\n", "x.csv has scores of 1 blocks, but the checkpoint has 2."),
        ("a,b\n1,2\n", "x.csv is not a table of block scores: its columns are a, b."),
        ("", "x.csv"),
        ("block,part,ppl\n0,attention,3\n1,attention,3\n", "x.csv has no scores of whole blocks."),
        ("block,score\n0,1\n0,2\n", "x.csv has block 0 twice."),
    ],
)
def test_other_files_are_one_sentence(where, text, sentence):
    with pytest.raises(DataError) as found:
        imported.keep("x.csv", text.encode(), "ppl", 2, where, "s")
    assert sentence in str(found.value)
    assert not imported.listed(where, "s")


def test_published_scores_give_the_published_order(where, real_dir):
    folder = real_dir / "published_scores" / "Llama-2-7b-hf"
    order = imported.scores.load(folder / "taylor.block_order.csv").order("taylor")
    data = (folder / "taylor.block_score_all.csv").read_bytes()
    path = imported.keep("taylor.block_score_all.csv", data, "taylor", 32, where, "llama")
    assert imported.scores.load(path).order("taylor") == order
