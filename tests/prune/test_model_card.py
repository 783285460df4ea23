"""A model card shows names from outside letter for letter, each in its own cell."""

from __future__ import annotations

import html
import re

import pytest
from markdown_it import MarkdownIt

from core.prune.model_card import depth_card, front_matter
from core.prune.results import Pruning
from core.retrain.model_card import merged_card
from core.retrain.spec import RetrainSpec

NAME = "a|b *c* <img src='there'> [x](there) &lt; `d` $e$"
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8,
          "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}  # fmt: skip


def cards():
    record = Pruning(
        base_model=NAME,
        source=NAME,
        criterion=NAME,
        dropped=(1,),
        blocks_before=3,
        parameters_before=4,
        parameters_after=3,
    )
    yield "pruned", depth_card(record, CONFIG)
    spec = RetrainSpec(checkpoint=NAME, data=f"hub:{NAME}", out="x")
    yield "retrained", merged_card(spec, CONFIG, steps=3, pruning=record)


@pytest.mark.parametrize(("kind", "card"), [pytest.param(*c, id=c[0]) for c in cards()])
def test_names_are_cells_and_nothing_else(kind, card):
    body = card.split("---\n", 2)[2]
    shown = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body)
    assert "<img" not in shown
    assert 'href="there' not in shown
    cells = [html.unescape(c) for c in re.findall(r"<td>(.*?)</td>", shown)]
    assert cells[cells.index("made from") + 1] == NAME
    assert len(re.findall(r"<th>", shown)) == 2 + 4  # two columns of facts, four of programs


def test_a_name_adds_no_metadata():
    assert "base_model: me/model" in front_matter("me/model", "kind")
    assert not any("base_model" in line for line in front_matter("me/model\n", "kind"))
