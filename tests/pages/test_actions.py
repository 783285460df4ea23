"""Buttons that act on a run: no redraw swallows the click, and an error is shown."""

from __future__ import annotations

from streamlit.testing.v1 import AppTest


def page():
    import streamlit as st

    from core.errors import InputError
    from core.ui import widgets

    def restart():
        if st.session_state.get("refuse"):
            raise InputError("Run r is running.", "Wait for its end.")
        st.session_state["restarted"] = st.session_state.get("restarted", 0) + 1

    if st.session_state.pop("ended", False):
        st.rerun()  # as a fragment does whose run has just ended
    widgets.action("Resume", restart, key="resume")
    widgets.action("Cancel", restart, key="cancel", told="Cancel requested.")


def test_a_click_that_arrives_with_a_redraw_is_not_lost():
    at = AppTest.from_function(page).run()
    at.session_state["ended"] = True
    at.button(key="resume").click().run()
    assert at.session_state["restarted"] == 1
    at.run()
    assert at.session_state["restarted"] == 1
    assert not at.error


def test_an_error_is_shown_until_the_next_drawing():
    at = AppTest.from_function(page).run()
    at.session_state["refuse"] = True
    at.button(key="resume").click().run()
    assert "Run r is running." in at.error[0].value
    at.run()
    assert not at.error


def test_what_was_done_is_said():
    at = AppTest.from_function(page).run()
    at.button(key="cancel").click().run()
    assert at.session_state["restarted"] == 1
    assert [toast.value for toast in at.toast] == ["Cancel requested."]
