"""What a session's draws see of the workspace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from core.runs import workspace
from core.ui import state


def test_a_fragment_that_draws_itself_again_looks_again(monkeypatch):
    context = SimpleNamespace(fragment_ids_this_run=None)
    monkeypatch.setattr(state, "get_script_run_ctx", lambda: context)

    def drawn():
        state.workspace()
        return workspace.draw()

    def session():
        workspace.begin_draw()
        page = workspace.draw()
        assert drawn() == page == drawn()  # as a part of its page
        context.fragment_ids_this_run = ["status"]
        first = drawn()
        assert first != page
        assert drawn() == first
        context.fragment_ids_this_run = ["status"]  # its next tick
        assert drawn() != first

    with ThreadPoolExecutor(1) as pool:
        pool.submit(session).result()
