"""What every page shares: setup, navigation, and the sidebar with device, model and runs."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib

import streamlit as st

from core.errors import DepthcutError
from core.runs import devices, warm
from core.runs.workspace import Workspace, begin_draw
from core.study import info_of, study
from core.ui import access, again, runs, say, state
from core.ui.say import plain

PAGES = {
    "home": ("app.py", "Home", ":material/home:"),
    "checkpoint": ("pages/checkpoint.py", "Checkpoint", ":material/database:"),
    "importance": ("pages/importance.py", "Importance", ":material/bar_chart:"),
    "prune": ("pages/prune.py", "Prune", ":material/content_cut:"),
    "retrain": ("pages/retrain.py", "Retrain", ":material/model_training:"),
    "evaluate": ("pages/evaluate.py", "Evaluate", ":material/quiz:"),
    "compare": ("pages/compare.py", "Compare", ":material/scatter_plot:"),
    "playground": ("pages/playground.py", "Playground", ":material/chat:"),
    "presentation": ("pages/presentation.py", "Presentation", ":material/co_present:"),
    "jobs": ("pages/jobs.py", "Jobs", ":material/list_alt:"),
}
"""Pages in workflow order: script, label, icon."""

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
    '<g fill="#0072B2"><rect x="1" y="1" width="14" height="3"/><rect x="1" y="12" width="14" '
    'height="3"/></g><rect x="1" y="6.5" width="14" height="3" fill="#D55E00"/></svg>'
)
"""Icon of the browser tab, drawn here: a named Material icon would be fetched from another site."""


PREPARE_AFTER_S = 2.0
"""How long after the first draw the next steps are prepared; the first page has the processor."""


def start(title: str, *, dense: bool = False) -> None:
    """Set up the page and draw the sidebar; every page calls this first.

    ``dense``: with narrow margins and without the title, which the page draws itself.
    """
    st.set_page_config(page_title=f"{title} · Depthcut", page_icon=ICON, layout="wide")
    access.check()
    begin_draw()
    model = state.current_checkpoint()
    _prepare(model)
    again.take()
    with st.sidebar:
        st.markdown("### :material/layers: Depthcut")
        for script, label, icon in PAGES.values():
            st.page_link(script, label=plain(label), icon=icon)
        st.divider()
        _model(model, settings=title != "Home")
        _status()
        _from_the_top(title)
    st.html(COMMON + DENSE if dense else COMMON)
    if not dense and title != "Home":
        st.title(plain(title))
    if not state.workspace().is_writable():
        say.warning(
            f"The workspace {state.workspace().root} is read-only: results can be "
            "viewed, but no run can be started, stopped or deleted."
        )


_SHOWN = "frame_page"
TOP = """document.querySelector('[data-testid="stMain"]')?.scrollTo(0, 0);"""


def _from_the_top(title: str) -> None:
    """Let a page that was just opened begin at its top: the browser may keep the last scroll."""
    before, times = st.session_state.get(_SHOWN, ("", 0))
    opened = before != title
    st.session_state[_SHOWN] = title, times + opened
    script = f"<script>/* {times:d} */ {TOP}</script>"  # one that is the same does not run again
    st.html(script if opened else "<span></span>", unsafe_allow_javascript=True)


@st.cache_resource(show_spinner=False)
def _prepare(checkpoint: str) -> None:
    """Once the first page is drawn, do in advance what the next ones and their runs need.

    The study is read, which takes seconds with a thousand runs and is kept; and runs on a CPU have
    their libraries imported, so that they start at once. A run on a GPU always imports them itself
    (`core.runs.warm`).
    """
    warm.later(PREPARE_AFTER_S, _read_ahead, state.workspace(), checkpoint)


def _read_ahead(where: Workspace, checkpoint: str) -> None:
    if checkpoint:
        with contextlib.suppress(DepthcutError, OSError):  # the page that needs it says so
            for variant in study(where, checkpoint).variants:
                info_of(variant)
    importlib.import_module("pandas")  # the tables of most pages; home has none at first
    _keep_what_is_loaded()
    if devices.resolve("auto") == "cpu":
        warm.keep()


@functools.cache
def _keep_what_is_loaded() -> None:
    """Have the garbage collector pass over what the libraries have loaded, from now on.

    These 140,000 objects stay until the process ends; a full collection looks at every one, holds
    all sessions up meanwhile, and comes every few redraws.
    """
    gc.collect()
    gc.freeze()


COMMON = """<style>
@media (min-width: 768px) {
  [data-testid="stMainBlockContainer"] { padding-top: 3.75rem; padding-bottom: 4rem; }
}
[data-testid="stMain"] h1 { font-size: 2.25rem; padding: 0 0 .4rem; }
</style>"""
"""All pages begin at the same height, with a title of one size: more of a result is in view."""
DENSE = """<style>
@media (min-width: 768px) {
  [data-testid="stMainBlockContainer"] { padding: 2.6rem 2rem 4rem; }
}
[data-testid="stMetric"] > div, [data-testid="stMetric"] { padding: .35rem .5rem; }
[data-testid="stMetricValue"], [data-testid="stMetricValue"] * { font-size: 1.3rem; }
[data-testid="stMetricLabel"] *, [data-testid="stMetricDelta"] * {
  white-space: normal; overflow: visible; min-width: 0;
}
[data-testid="stMetricDelta"] { padding: 0; background: none; height: auto; font-size: .8rem; }
[data-testid="stMetricDelta"] > div { max-width: 100%; }
</style>"""
"""A page that shows everything at once leaves no wide margins."""


def link(page: str, label: str = "") -> None:
    """Draw a link to another page."""
    script, name, icon = PAGES[page]
    st.page_link(script, label=plain(label or name), icon=icon)


MAIN = """<style>
[class*="st-key-step_"] a {
  background: light-dark(#0072B2, #56B4E9); padding: .45rem .9rem; border-radius: 8px;
}
[class*="st-key-step_"] a:hover { filter: brightness(1.08); }
[class*="st-key-step_"] a p, [class*="st-key-step_"] a span {
  color: light-dark(#FFFFFF, #11161C) !important;
}
</style>"""
"""A link that looks like a primary button, in the colours of the themes."""


def step(page: str, label: str, query: dict[str, str] | None = None) -> None:
    """Draw the page's main link, which looks like a button and opens another page.

    The browser goes there itself and stops the timers of the page that it leaves; after
    `st.switch_page` one of them could run for the old page and clear the new one.
    """
    script, _, icon = PAGES[page]
    with st.container(key=f"step_{page}", width="content"):
        st.html(MAIN)
        st.page_link(script, label=plain(label), icon=icon, query_params=query)


def _model(name: str, *, settings: bool) -> None:
    st.caption("Active checkpoint")
    if not name:
        st.markdown("none yet")
        return
    label = state.names().checkpoint(name)
    st.markdown(f"**{plain(label)}**", help=None if label == name else plain(name))
    if settings:
        st.page_link("app.py", label="Study settings", icon=":material/tune:")


@st.fragment(run_every=5)
def _status() -> None:
    """Draw devices and running jobs; redrawn every few seconds."""
    st.caption("Device")
    for device in devices.devices():
        st.markdown(
            f"**{plain(device.label)}**  \n{device.free_gib:.1f} of {device.total_gib:.1f} GiB free"
        )
    for gpu in devices.unusable():
        say.warning(f"{gpu.gpu} is present but cannot be used: {gpu.why}.", icon=":material/error:")
        st.code(gpu.fix, language=None, wrap_lines=True)
    live = [r for r in state.workspace().runs() if r.is_live]
    ids = {r.id for r in live}
    live = [r for r in live if r.parent not in ids]  # a recipe's steps are its own
    st.caption("Running jobs")
    if not live:
        st.markdown("none")
    for record in live[:5]:
        runs.line(record)
    if len(live) > 5:
        st.caption(f"and {len(live) - 5} more")
    if live:
        st.page_link("pages/jobs.py", label="See all jobs", icon=":material/arrow_forward:")
