"""The pages as scripts: what they draw is what the files hold; no torch, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import study_helpers as made
from streamlit.testing.v1 import AppTest

from core.__main__ import main

ROOT = Path(__file__).parents[2]
PAGES = ("app.py", "pages/checkpoint.py", "pages/importance.py", "pages/prune.py", "pages/jobs.py")


@pytest.fixture(scope="module")
def scored(tiny_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A workspace with one importance run of a tiny checkpoint, made by the command line."""
    workspace = tmp_path_factory.mktemp("workspace")
    folder = tiny_dir("gqa")
    rows = [{"input_ids": [(7 * r + i) % 300 for i in range(24)]} for r in range(4)]
    text = workspace.parent / "rows.jsonl"
    text.write_text("\n".join(json.dumps(r) for r in rows))
    arguments = ["importance", str(folder), "--out", str(workspace / "imp")]
    arguments += ["--calibration", str(text), "--samples", "4", "--length", "24"]
    environment = pytest.MonkeyPatch()
    environment.setenv("DEPTHCUT_LOCK_DIR", str(workspace.parent / "locks"))
    assert main([*arguments, "--workspace", str(workspace)]) == 0
    environment.undo()
    return workspace, folder


def open_page(
    script: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, **query: str
) -> AppTest:
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(workspace))
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    for name, value in query.items():
        page.query_params[name] = value
    page.run()
    if script != "app.py":
        page.switch_page(script)
        for name, value in query.items():
            page.query_params[name] = value
        page.run()
    assert not page.exception, page.exception
    return page


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence that the command line printed; Streamlit may have said things before."""
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    return last.removeprefix("Error: ")


def figures(page: AppTest) -> list[dict[str, Any]]:
    return [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]


@pytest.mark.parametrize("script", PAGES)
def test_every_page_opens_cold_without_a_checkpoint(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(script, tmp_path, monkeypatch)
    if script != "pages/jobs.py":
        assert any(b.label == "Load the demo" for b in page.button)


def test_one_click_loads_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = open_page("app.py", tmp_path, monkeypatch)
    next(b for b in page.button if b.label == "Load the demo").click().run()
    assert not page.exception
    assert page.query_params["model"] in ("demo", ["demo"])
    assert json.loads((tmp_path / "active.json").read_text())["active"] == "demo"
    assert any(m.label == "Blocks" for m in page.metric)


def test_a_wrong_checkpoint_gets_the_command_lines_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "no/such/folder"]) == 2
    sentence = error_of(capsys)
    page = open_page("pages/checkpoint.py", tmp_path, monkeypatch, model="no/such/folder")
    assert [e.value for e in page.error] == [sentence]


def test_checkpoint_page_shows_the_counts(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, folder = scored
    page = open_page("pages/checkpoint.py", workspace, monkeypatch, model=str(folder))
    from core.checkpoint import headers

    info = headers.inspect(folder)
    values = {m.label: m.value for m in page.metric}
    assert values["Parameters"] == f"{info.parameters:,}"
    assert values["Blocks"] == str(info.blocks)


def test_importance_page_draws_the_files(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, folder = scored
    page = open_page("pages/importance.py", workspace, monkeypatch, model=str(folder))
    blocks = pd.read_csv(workspace / "imp" / "blocks.csv")
    drawn = [trace for figure in figures(page) for trace in figure["data"]]

    def decoded(values: Any) -> list[float]:
        if isinstance(values, dict):
            import base64

            import numpy as np

            return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
        return values

    bars = [decoded(t["y"]) for t in drawn if t["type"] == "bar" and t.get("y") is not None]
    for column in ("ppl", "taylor", "magnitude", "block_influence", "relative_update"):
        expected = pytest.approx(blocks[column].tolist(), rel=1e-6)
        assert any(y == expected for y in bars if len(y) == len(blocks)), column
    assert len(figures(page)) == 8
    captions = " ".join(c.value for c in page.caption)
    assert "4 x 24 tokens, seed 1234, cpu, float32" in captions


def test_importance_page_refuses_what_the_command_line_refuses(
    scored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, folder = scored
    page = open_page("pages/importance.py", workspace, monkeypatch, model=str(folder))
    next(n for n in page.number_input if n.label.startswith("Length")).set_value(100000).run()
    assert any("exceed the model's context" in e.value for e in page.error)
    button = next(b for b in page.button if b.label == "Score the blocks")
    assert button.disabled


def test_prune_page_shows_what_is_left(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, folder = scored
    page = open_page(
        "pages/prune.py", workspace, monkeypatch, model=str(folder), drop="2,3", run="imp"
    )
    from core.checkpoint import headers
    from core.prune.plan import parameters_after

    info = headers.inspect(folder)
    text = "\n".join(t.value.to_csv() for t in page.table)
    assert f"{parameters_after(info, (2, 3)):,}" in text
    assert any("--drop 2,3" in c.value for c in page.code)


def test_prune_page_and_command_line_refuse_with_one_sentence(
    scored: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, folder = scored
    drop = "0,1,2,3,4"
    page = open_page("pages/prune.py", workspace, monkeypatch, model=str(folder), drop=drop)
    assert main(["prune", str(folder), "--drop", drop, "--dry-run", "--out", "x"]) == 2
    sentence = error_of(capsys)
    assert sentence in [e.value for e in page.error]


def test_home_counts_what_was_pruned_from_the_active_checkpoint(
    scored: Any, tiny_dir: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, folder = scored
    shutil.copytree(workspace, tmp_path / "ws")
    made.pruned(tmp_path / "ws", "of-another", tiny_dir("mha"), [1], 1, 99999)
    home = open_page("app.py", tmp_path / "ws", monkeypatch, model=str(folder))
    assert not any("pruned variant" in m.value for m in home.markdown)
    made.pruned(tmp_path / "ws", "of-this", folder, [1], 2, 99999)
    home = open_page("app.py", tmp_path / "ws", monkeypatch, model=str(folder))
    told = f"1 pruned variant so far; the latest is **{folder.name} without 1"
    assert any(told in m.value for m in home.markdown)


def test_jobs_page_lists_the_run(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, _ = scored
    page = open_page("pages/jobs.py", workspace, monkeypatch)
    text = " ".join(m.value for m in page.markdown)
    assert "imp" in text
    assert "done" in text


def test_the_dashboard_never_imports_torch() -> None:
    code = (
        "import sys, pathlib, importlib.util, pkgutil\n"
        "import core.ui, core.charts\n"
        "for package in (core.ui, core.charts):\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        __import__(f'{package.__name__}.{module.name}')\n"
        "from core.commands import COMMANDS\n"
        "for command in COMMANDS.values(): command.spec_class\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = AppTest.from_file('app.py', default_timeout=60)\n"
        "app.query_params['model'] = 'demo'\n"
        "app.run()\n"
        "for page in sorted(pathlib.Path('pages').glob('*.py')):\n"
        "    app.switch_page(str(page)); app.run(); assert not app.exception, app.exception\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["False", "False"]


def test_a_page_begins_at_its_top_and_then_stays_where_it_is_read(here: Any) -> None:
    def scrolls(at: AppTest) -> int:
        return ["scrollTo" in e.proto.body for e in at.get("html")].count(True)

    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.query_params["model"] = "demo"
    for page, times in (("", 1), ("", 0), ("checkpoint", 1), ("checkpoint", 0), ("jobs", 1)):
        if page:
            at.switch_page(f"pages/{page}.py")
        at.run()
        assert not at.exception, at.exception
        assert scrolls(at) == times, page
