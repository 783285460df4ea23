"""Small differences from the public implementations, each with its correct value."""

from __future__ import annotations

import json

import pytest

from core import words
from core.data.evaluation import evaluation_windows
from core.errors import PlanError
from core.evaluate.spec import EvaluateSpec, check_model
from core.evaluate.zero_shot import sample
from core.prune import plan, scores
from core.prune.scores import BlockScores


def test_the_authors_block_order_is_an_order_to_plan_by(tmp_path):
    (tmp_path / "taylor.block_order.csv").write_text("4,0,3,1,2\n")
    found = scores.load(tmp_path / "taylor.block_order.csv")
    assert found.order("taylor") == (4, 0, 3, 1, 2)
    made = plan.choose(found, "taylor", count=2, protect_first=1, protect_last=0)
    assert made.drop == (4, 3)


def test_the_published_orders_are_read_whole(real_dir):
    for path in (real_dir / "published_scores").glob("*/*.block_order.csv"):
        wanted = tuple(map(int, path.read_text().strip().split(",")))
        assert scores.load(path).order(path.name.split(".")[0]) == wanted


def test_extra_bos_makes_windows_of_one_token_more():
    ids = list(range(10, 22))
    assert evaluation_windows(ids, 4, "extra", 1) == [
        [1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 20, 21],
    ]  # fmt: skip
    assert evaluation_windows(ids, 4, "window", 1)[0] == [1, 10, 11, 12]
    assert evaluation_windows(ids, 4, "extra", None)[0] == [10, 11, 12, 13]


def test_an_extra_bos_must_fit_the_context(tiny_gqa):
    from core.checkpoint import headers

    info = headers.inspect(tiny_gqa)
    spec = {"checkpoint": "x", "out": "y", "perplexity": ("demo",), "window": (info.context,)}
    check_model(EvaluateSpec(**spec, bos="window"), info)
    with pytest.raises(Exception, match=f"{info.context + 1} tokens .* Use {info.context - 1}"):
        check_model(EvaluateSpec(**spec, bos="extra"), info)


def test_the_limit_of_a_greedy_search_is_not_explained_as_protection():
    found = BlockScores("run", 8, {}, greedy=(3, 4))
    with pytest.raises(PlanError) as raised:
        plan.choose(found, "sleb", count=4)
    assert "Greedy search removed only 2 blocks" in str(raised.value)
    assert "protect" not in str(raised.value)


@pytest.mark.parametrize(
    ("share", "text"),
    [(-0.001, "0%"), (-0.0049, "0%"), (0.0, "0%"), (-0.02, "-2%"), (0.505, "50%"), (1.2, "120%")],
)
def test_no_share_is_minus_zero(share, text):
    assert words.percent(share) == text


def test_samples_keep_the_raw_generation():
    entry = {
        "doc_id": 3, "filter": "get-answer", "doc_hash": "h", "metrics": ["exact_match"],
        "exact_match": 1.0, "target": "4", "arguments": [("2 + 2?", {"until": ["Q:"]})],
        "resps": [["It is 4, so #### 4"]], "filtered_resps": ["4"],
    }  # fmt: skip
    found = sample("gsm8k", entry)
    assert (found.answer, found.generated) == ("4", ("It is 4, so #### 4",))
    assert json.dumps(found.generated)
