"""A click on a column of the Taylor heatmap drops that block in the Prune page's plan."""

from __future__ import annotations

HEATMAP = """() => [...document.querySelectorAll(".js-plotly-plot")].findIndex(
    chart => chart._fullLayout && chart.data.some(trace => trace.type === "heatmap"
        && trace.y.includes("gate")))"""
CELL = """(chart, [module, block]) => {
    const x = chart._fullLayout.xaxis2, y = chart._fullLayout.yaxis2;
    const box = chart.getBoundingClientRect();
    return [box.left + x._offset + x.c2p(x.d2c(block)), box.top + y._offset + y.c2p(y.d2c(module))];
}"""
CROSSED = """number => {
    const chart = document.querySelectorAll(".js-plotly-plot")[number];
    const bars = chart.data.find(trace => trace.type === "bar");
    return bars.x.filter((_, place) => bars.marker.pattern.shape[place]);
}"""


def click_cell(visitor, module, block):
    """Click one cell of the heatmap where the browser drew it."""
    visitor.page.wait_for_function(f"({HEATMAP})() >= 0")
    chart = visitor.page.locator(".js-plotly-plot").nth(visitor.page.evaluate(HEATMAP))
    chart.scroll_into_view_if_needed()
    visitor.page.mouse.click(*chart.evaluate(CELL, [module, block]))


def test_a_column_of_the_taylor_heatmap_drops_its_block(visit, server, tiny_dir):
    """With columns of a few pixels, where a neighbour is easily taken for the block meant."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    folder = tiny_dir("gqa", num_hidden_layers=126, **size)
    out = server.workspace / "scores-to-click"
    server.command(
        *("importance", str(folder), "--out", str(out), "--metrics", "taylor"),
        *("--samples", "1", "--length", "8", "--device", "cpu"),
    )
    visitor = visit()
    page = visitor.page
    visitor.open(f"/importance?model={folder}&run={out.name}")
    for module, block, chosen in (("v", 77, "77"), ("down", 3, "77, 3"), ("q", 77, "3")):
        click_cell(visitor, module, block)
        page.get_by_text(f"Chosen: {chosen}.").wait_for()
        visitor.settle()
    assert page.evaluate(CROSSED, page.evaluate(HEATMAP)) == [3]

    page.get_by_test_id("stSidebar").get_by_role("link", name="Prune").click()
    page.get_by_role("heading", name="Create the variant").wait_for()
    page.get_by_text("--drop 3 ").first.wait_for()
    page.wait_for_url(lambda url: url.endswith("drop=3") or "drop=3&" in url)
    visitor.check()
