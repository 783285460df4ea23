"""A figure is drawn again only if something that it shows has changed."""

from __future__ import annotations

import plotly.graph_objects as go

from core.charts import memo
from core.compare.candidates import Candidate


def test_equal_arguments_give_the_figure_drawn_before():
    made = []

    @memo.drawn_once
    def draw(found, *, at=None):
        made.append(list(found))
        return go.Figure().add_scatter(x=[c.ratio for c in found], y=[at])

    def candidates(*ratios):
        return [Candidate(f"c{r}", "label", "depth", ratio=r) for r in ratios]

    first = draw(candidates(0.1, 0.2), at=1)
    assert draw(candidates(0.1, 0.2), at=1) is first  # other objects, the same values
    assert list(draw(candidates(0.1, 0.3), at=1).data[0].x) == [0.1, 0.3]
    assert draw(candidates(0.1, 0.2), at=2) is not first
    growing = candidates(0.4)
    alone = draw(growing)
    growing += candidates(0.5)
    assert draw(growing) is not alone
    assert len(made) == 5
    for number in range(memo.KEPT):
        draw([], at=number)
    assert draw(candidates(0.1, 0.2), at=1) is not first  # the oldest are forgotten
