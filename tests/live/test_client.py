"""Which live process a question goes to: one on the device and in the precision asked for."""

from __future__ import annotations

import pytest
import study_helpers as made

from core.live import client
from core.runs import jobs
from core.runs.workspace import Workspace, read_run


@pytest.mark.parametrize(
    ("has", "asks", "same"),
    [
        ({}, {}, True),
        ({"dtype": "float32"}, {"dtype": "auto"}, True),
        ({"dtype": "auto"}, {"dtype": "float32"}, False),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, False),
        ({"device": "cpu"}, {"device": "auto"}, True),
        ({"device": "cuda"}, {"device": "cuda:0"}, True),
        ({"device": "cuda:1"}, {"device": "cpu"}, False),
    ],
)
def test_another_device_or_precision_replaces_the_live_model(
    tmp_path, monkeypatch, has, asks, same
):
    record = read_run(made.run(tmp_path, "live-1", "live", 1, **has))
    stopped, started = [], []
    monkeypatch.setattr(client, "running", lambda where: record)
    monkeypatch.setattr(client, "stop", stopped.append)
    monkeypatch.setattr(jobs, "launch", lambda *given: started.append(given) or "new")
    found = client._one(Workspace(tmp_path), asks)
    assert (found is record, bool(stopped), bool(started)) == (same, not same, not same)
    if started:
        assert started[0][:2] == ("live", asks)
