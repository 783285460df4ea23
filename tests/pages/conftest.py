"""Fixtures shared by the tests of pages."""

from __future__ import annotations

import pytest

from core.runs import jobs
from core.runs.workspace import Workspace


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A workspace of the test's own; runs that still live at its end are killed."""
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    where = Workspace()
    yield where
    for record in where.runs():
        if record.is_live:
            jobs.LocalLauncher().kill(record)
