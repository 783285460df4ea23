"""One live process for the tests that only ask it; one torch import instead of many."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent))
from core.live import client
from core.runs import warm
from core.runs.workspace import Workspace


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of a few hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text(tiny.text(24, seed=3))
    return path


@pytest.fixture(scope="module")
def live(tmp_path_factory, template):
    """A live process without a model, in a workspace and with device locks of its own."""
    root = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DEPTHCUT_WORKSPACE", str(root / "workspace"))
        environment.setenv("DEPTHCUT_LOCK_DIR", str(root / "locks"))
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.delenv("DEPTHCUT_DETACHED", raising=False)
        with pytest.MonkeyPatch.context() as prepared:
            prepared.setattr(warm, "_kept", template)
            record = client.ensure(Workspace(), {"device": "cpu"})
        yield record
        client.stop(record)
