"""The toggle pad's logic: clicks, pills and addresses."""

from __future__ import annotations

import pytest

from core.checkpoint.drop import Removal
from core.errors import OptionError
from core.prune import toggle


def event(*points):
    return {"selection": {"points": list(points)}}


def click(chosen, happened, blocks=5):
    return toggle.click(chosen, toggle.clicked_blocks(happened), blocks)


def test_a_click_chooses_and_a_second_click_releases():
    chosen = click((), event({"x": 3, "customdata": [3, 8.5]}))
    chosen = click(chosen, event({"x": 1, "customdata": [1, 7.0]}))
    assert chosen == (3, 1)
    assert click(chosen, event({"x": 3, "customdata": [3, 8.5]})) == (1,)


def test_customdata_names_the_block_before_x():
    assert toggle.clicked_blocks(event({"x": "block 7", "customdata": [7]})) == (7,)
    assert toggle.clicked_blocks(event({"x": 9, "customdata": 2})) == (2,)
    assert toggle.clicked_blocks(event({"x": 4})) == (4,)


@pytest.mark.parametrize(
    "nothing", [None, {}, {"selection": None}, {"selection": {"points": []}}, event({"x": "dense"})]
)
def test_an_event_without_blocks_changes_nothing(nothing):
    assert click((2, 0), nothing) == (2, 0)


def test_what_a_late_chart_still_holds_is_no_second_click():
    assert toggle.newly((3, 100), (3,)) == (100,)
    assert toggle.newly((3,), (3,)) == (3,)
    assert toggle.newly((), (3,)) == ()


def test_traces_that_share_a_bar_toggle_it_once():
    assert click((), event({"x": 2, "customdata": [2]}, {"x": 2, "customdata": [2]})) == (2,)


def test_blocks_that_are_not_there_are_ignored():
    assert click((1,), event({"x": 5}, {"x": -1})) == (1,)


def test_pills_keep_the_removal_order_of_what_stays():
    assert toggle.follow((5, 2, 9), [9, 1, 5]) == (5, 9, 1)
    assert toggle.follow((), [4, 4, 3]) == (4, 3)
    assert toggle.follow((5, 2), []) == ()


def test_the_address_gives_the_same_choice_back():
    for chosen in ((), (3, 5), tuple(range(125, -1, -1))):
        assert toggle.from_text(toggle.to_text(chosen)) == chosen
    assert toggle.from_text("4-6,4") == (4, 5, 6)


@pytest.mark.parametrize("text", ["x", "3,two", "9-4", "0-999999999", "1," * 2000])
def test_a_broken_address_is_told_in_a_sentence(text):
    with pytest.raises(OptionError, match="--drop"):
        toggle.from_text(text)


def test_a_click_on_a_part_removes_it_and_both_parts_are_the_block():
    chosen = Removal((4,), (1,))
    chosen = toggle.toggle_part(chosen, 2, "mlp")
    assert chosen == Removal((4,), (1,), (2,))
    assert toggle.toggle_part(chosen, 1, "attention") == Removal((4,), (), (2,))
    assert toggle.toggle_part(chosen, 1, "mlp") == Removal((4, 1), (), (2,))
    assert toggle.toggle_part(chosen, 4, "mlp") == Removal((), (1, 4), (2,))  # its MLP is back
    assert toggle.with_drop(chosen, (4, 2)) == Removal((4, 2), (1,))
    assert toggle.follow_part(chosen, "mlp", (1, 3)) == Removal((4, 1), (), (3,))
    found = toggle.clicked_parts(event({"customdata": [3, "mlp", "kept"]}))
    assert found == ((3, "mlp"),)
    assert toggle.clicked_parts(event({"customdata": [3, "kept"]}, {"x": 2})) == ()
