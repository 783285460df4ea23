"""The Importance page in a browser: a click on a heatmap's column drops the block on Prune too."""

from __future__ import annotations

import pytest

HEATMAP = ".js-plotly-plot:has(.subplot.x2y2, .subplot.xy2)"
"""The only chart here with a second plot below the first."""


@pytest.fixture
def scored(server, tiny_gqa):
    """Taylor scores of the tiny model, in the server's workspace."""
    out = server.workspace / "columns"
    server.command(
        *("importance", str(tiny_gqa), "--out", str(out), "--metrics", "taylor"),
        *("--samples", "1", "--length", "16", "--device", "cpu"),
    )
    return tiny_gqa


def click(visitor, block, module=None):
    """Click the cell of ``block`` and ``module``, or the block's bar above the heatmap."""
    chart = visitor.page.locator(HEATMAP).first
    chart.scroll_into_view_if_needed()
    place = chart.evaluate(
        """(chart, [block, module]) => {
            const layout = chart._fullLayout, box = chart.getBoundingClientRect();
            const bars = chart.data.find(trace => trace.type === "bar");
            const y = module ? layout.yaxis2 : layout.yaxis;
            const height = module ? y.d2c(module) : y.d2c(bars.y[block]) / 2;
            return [box.left + layout.xaxis._offset + layout.xaxis.c2p(block),
                    box.top + y._offset + y.c2p(height)];
        }""",
        [block, module],
    )
    visitor.page.mouse.click(*place)


def chosen(visitor, blocks):
    """Wait until the line under the heatmap names these blocks."""
    visitor.page.get_by_text(f"Chosen: {blocks}.").wait_for()
    visitor.settle()


def test_a_clicked_column_is_dropped_on_the_prune_page(visit, scored):
    visitor = visit()
    page = visitor.page
    visitor.open(f"/importance?model={scored}&run=columns")
    page.get_by_role("heading", name="Taylor importance by module").wait_for()
    chosen(visitor, "none")
    click(visitor, 3, "o")
    chosen(visitor, "3")
    click(visitor, 1)
    chosen(visitor, "3, 1")
    click(visitor, 4, "input_norm")
    chosen(visitor, "3, 1, 4")
    click(visitor, 3, "down")
    chosen(visitor, "1, 4")
    crossed = page.locator(HEATMAP).first.evaluate("e => e.data[0].marker.pattern.shape")
    assert [block for block, shape in enumerate(crossed) if shape] == [1, 4]

    page.get_by_test_id("stSidebar").get_by_role("link", name="Prune").click()
    page.get_by_role("heading", name="Create the variant of plan A").wait_for()
    visitor.settle()
    assert "--drop 1,4" in page.get_by_test_id("stMain").inner_text()
    assert "drop=1%2C4" in page.url
    visitor.check()
