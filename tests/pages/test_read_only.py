"""A workspace that takes no files: every page says so in one sentence and still shows results."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from core.runs import workspace

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "pages").glob("*.py"))


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    book = tmp_path / "importance-1" / ".run"
    spec = {"command": "importance", "spec": {"checkpoint": "demo"}, "argv": []}
    workspace.write_json(book / "spec.json", spec)
    workspace.write_json(book / "status.json", {"state": "done", "created": 1.0})
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse(path, *_, **__):
        raise workspace.cannot_write(path, refused)

    def mkdir(path, *_, **__):
        raise refused

    access = os.access

    def asked(path, mode):
        inside = Path(path).is_relative_to(tmp_path)
        return access(path, mode) and not (inside and mode & os.W_OK)

    monkeypatch.setattr(workspace, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(os, "access", asked)
    return tmp_path


@pytest.mark.parametrize("page", ["app.py", *PAGES])
def test_every_page_says_so_in_one_sentence(read_only, page):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    at.query_params["model"] = "demo"
    if page != "app.py":
        at.switch_page(page)
    at.run()
    assert not at.exception, at.exception
    (told,) = [w.value for w in at.warning if "is read-only" in w.value]
    assert "no run can be started, stopped or deleted" in told


def test_what_cannot_be_written_is_told_and_the_rest_works(read_only):
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    next(b for b in at.button if b.label == "Load the demo").click()
    at.run()
    assert not at.exception, at.exception
    assert at.metric[0].value == "demo"  # active in this session, though it is not remembered
    next(b for b in at.button if b.label == "Run the recipe").click()
    at.run()
    assert not at.exception, at.exception
    assert any("Read-only file system" in e.value for e in at.error)
