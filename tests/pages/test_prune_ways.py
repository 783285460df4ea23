"""The Prune page has two ways: blocks, and width; the address keeps which."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

APP = str(Path(__file__).parents[2] / "app.py")


def test_the_width_way_offers_the_methods(tiny_gqa, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    page = AppTest.from_file(APP, default_timeout=60).switch_page("pages/prune.py")
    page.query_params["model"] = str(tiny_gqa)
    page.run()
    assert not page.exception, page.exception
    assert any(b.label == "Create the variant" for b in page.button)
    page.session_state["prune_way"] = "Width"
    page.run()
    assert not page.exception, page.exception
    assert any("core width" in code.value for code in page.code)
    assert not any("core prune" in code.value for code in page.code)
