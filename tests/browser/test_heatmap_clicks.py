"""The Importance page in a browser: a click on a heatmap's column drops the block on Prune too."""

from __future__ import annotations

import pytest

HEATMAP = ".js-plotly-plot:has(.subplot.x2y2, .subplot.xy2)"
"""The only chart here with a second plot below the first."""


@pytest.fixture
def scored(server):
    """Return what makes Taylor scores of a checkpoint, as a run of the server's workspace."""

    def score(folder, name):
        out = server.workspace / name
        server.command(
            *("importance", str(folder), "--out", str(out), "--metrics", "taylor"),
            *("--samples", "1", "--length", "8", "--device", "cpu"),
        )

    return score


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


def crossed(visitor):
    """Return the blocks whose bars are drawn as dropped."""
    shapes = visitor.page.locator(HEATMAP).first.evaluate("e => e.data[0].marker.pattern.shape")
    return [block for block, shape in enumerate(shapes) if shape]


def opened(visit, folder, run):
    """Open a run's heatmap with nothing chosen."""
    visitor = visit()
    visitor.open(f"/importance?model={folder}&run={run}")
    visitor.page.get_by_role("heading", name="Taylor importance by module").wait_for()
    chosen(visitor, "none")
    return visitor


def test_clicked_cells_and_bars_are_dropped_on_the_prune_page(visit, scored, tiny_gqa):
    scored(tiny_gqa, "columns")
    visitor = opened(visit, tiny_gqa, "columns")
    page = visitor.page
    click(visitor, 3, "o")
    chosen(visitor, "3")
    click(visitor, 1)
    chosen(visitor, "3, 1")
    click(visitor, 4, "input_norm")
    chosen(visitor, "3, 1, 4")
    click(visitor, 3, "down")
    chosen(visitor, "1, 4")
    assert crossed(visitor) == [1, 4]

    page.get_by_test_id("stSidebar").get_by_role("link", name="Prune", exact=True).click()
    page.get_by_role("heading", name="Create the variant of plan A").wait_for()
    visitor.settle()
    assert "--drop 1,4" in page.get_by_test_id("stMain").inner_text()
    assert "drop=1%2C4" in page.url
    visitor.check()


def test_a_narrow_column_drops_its_own_block(visit, scored, tiny_dir):
    """With columns of a few pixels, where a neighbour is easily taken for the block meant."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    folder = tiny_dir("gqa", num_hidden_layers=126, **size)
    scored(folder, "narrow-columns")
    visitor = opened(visit, folder, "narrow-columns")
    page = visitor.page
    for module, block, blocks in (("v", 77, "77"), ("down", 3, "77, 3"), ("q", 77, "3")):
        click(visitor, block, module)
        chosen(visitor, blocks)
    assert crossed(visitor) == [3]

    page.get_by_test_id("stSidebar").get_by_role("link", name="Prune", exact=True).click()
    page.get_by_role("heading", name="Create the variant").wait_for()
    page.get_by_text("--drop 3 ").locator("visible=true").first.wait_for()
    page.wait_for_url(lambda url: url.endswith("drop=3") or "drop=3&" in url)
    visitor.check()
